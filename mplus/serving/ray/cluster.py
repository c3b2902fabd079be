"""Starting and ending the engines of a server on Ray; fronts speak HTTP, and reach them by a RayEngineClient."""

from __future__ import annotations

import os

import ray
from attrs import evolve
from ray import serve
from ray.serve.config import RequestRouterConfig

from mplus.serving.ray.client import RayEngineClient
from mplus.serving.ray.replica import EngineReplica, EngineSettings
from mplus.serving.ray.router import OwnerRouter
from mplus.serving.ray.scaling import Engines

APPLICATION, ENGINES = "mplus", "engines"
UNBOUNDED = 100_000
"""Requests at a replica: engines bound their queues themselves, tenant by tenant, and refuse with a reason."""
LOCK_SECONDS = 0.25
"""Seconds that an engine waits for a memory that another one has open, before that one is asked for it."""
GRACE = 35.0
"""Seconds that an engine has to end: more than the answers that run in it have."""
HEALTH_SECONDS = 2.0


class Cluster:
    """A connection to Ray, and the engines there.

    The cluster that ``RAY_ADDRESS`` names is used; where it names none, one is started on this machine, for as long as
    this lasts. Where engines of a server run already, they are joined: this process is one more front for them.

    Example:
        >>> client = Cluster().start(EngineSettings(source=source, config=config), Engines(most=4))  # doctest: +SKIP
        >>> await client.close()  # doctest: +SKIP
    """

    def __init__(self) -> None:
        address = os.environ.get("RAY_ADDRESS")
        # A cluster of this machine alone stays on loopback.
        local = {} if address else {"_node_ip_address": "127.0.0.1", "include_dashboard": False}
        ray.init(address=address, ignore_reinit_error=True, log_to_driver=False, **local)
        self._started = False

    def start(self, settings: EngineSettings, engines: Engines) -> RayEngineClient:
        """Start the engines, or join those that run, and return a client of them once they answer."""
        serve.start(proxy_location="Disabled")
        if APPLICATION not in serve.status().applications:
            self._started = True
            config = evolve(settings.config, lock_seconds=LOCK_SECONDS)
            deployment = serve.deployment(EngineReplica, name=ENGINES).options(
                ray_actor_options=dict(engines.resources),
                max_ongoing_requests=UNBOUNDED,
                graceful_shutdown_timeout_s=GRACE,
                health_check_period_s=HEALTH_SECONDS,
                request_router_config=RequestRouterConfig(request_router_class=OwnerRouter),
                **engines.options(config.max_batch),
            )
            serve.run(deployment.bind(evolve(settings, config=config)), name=APPLICATION, route_prefix=None)
        return RayEngineClient(serve.get_deployment_handle(ENGINES, APPLICATION), self.close)

    def close(self) -> None:
        """End the engines that this started, which close their memories; then disconnect."""
        if self._started:
            serve.delete(APPLICATION)
            serve.shutdown()
        ray.shutdown()
