"""Starting and ending a server on Ray: a front that speaks HTTP, and engines behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ray
from attrs import define, evolve, field
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, HTTPOptions, RequestRouterConfig
from starlette.types import ASGIApp

from mplus.serving.messages import EngineClient
from mplus.serving.ray.client import RayEngineClient
from mplus.serving.ray.replica import EngineReplica, EngineSettings
from mplus.serving.ray.router import OwnerRouter
from mplus.serving.ray.scaling import WantedEngines

APPLICATION, ENGINES, FRONT = "mplus", "engines", "front"
UNBOUNDED = 100_000
"""Requests at a replica: engines bound their queues themselves, tenant by tenant, and refuse with a reason."""
LOCK_SECONDS = 0.25
"""Seconds that an engine waits for a memory that another one has open, before that is asked for it."""
GRACE = 35.0
"""Seconds that a replica has to end: more than the answers that run in it have."""


@define(frozen=True, kw_only=True)
class ClusterSettings:
    """Settings of a server on Ray beside those of its engines.

    Attributes:
        host, port: that the proxies of Ray listen at.
        fewest, most: engines; equal: as many, always.
        fronts: processes that speak HTTP and tokenise.
        engine_options: of Ray for each engine, such as ``{"num_cpus": 8, "num_gpus": 1}``.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    fewest: int = 1
    most: int = 1
    fronts: int = 1
    engine_options: Mapping[str, float] = field(factory=lambda: {"num_cpus": 1})


def start(settings: EngineSettings, front: Callable[[EngineClient], ASGIApp], cluster: ClusterSettings) -> None:
    """Start a server on the Ray cluster that this process is connected to, and return once it answers.

    Args:
        settings: of the engines.
        front: makes the application that speaks HTTP, in each process of the front.
        cluster: where and how many.
    """
    serve.start(http_options=HTTPOptions(host=cluster.host, port=cluster.port, request_timeout_s=None))
    engines = serve.deployment(EngineReplica, name=ENGINES).options(
        ray_actor_options=dict(cluster.engine_options),
        max_ongoing_requests=UNBOUNDED,
        graceful_shutdown_timeout_s=GRACE,
        health_check_period_s=2,
        request_router_config=RequestRouterConfig(request_router_class=OwnerRouter),
        **_replicas(cluster, settings.config.max_batch),
    )

    def application() -> ASGIApp:
        return front(RayEngineClient(serve.get_deployment_handle(ENGINES, APPLICATION)))

    fronts = serve.deployment(serve.ingress(application)(), name=FRONT).options(
        num_replicas=cluster.fronts,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=UNBOUNDED,
        graceful_shutdown_timeout_s=GRACE,
    )
    config = evolve(settings.config, lock_seconds=LOCK_SECONDS)
    serve.run(fronts.bind(engines.bind(evolve(settings, config=config))), name=APPLICATION, route_prefix="/")


def _replicas(cluster: ClusterSettings, places: int) -> dict[str, Any]:
    if cluster.fewest == cluster.most:
        return {"num_replicas": cluster.fewest}
    policy = AutoscalingPolicy(policy_function=WantedEngines, policy_kwargs={"places": places})
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=cluster.fewest, max_replicas=cluster.most, policy=policy, upscale_delay_s=5
        )
    }


def connect(host: str) -> None:
    """Connect to the cluster that ``RAY_ADDRESS`` names, or start one on this machine; on loopback, it stays there."""
    local = {"_node_ip_address": "127.0.0.1"} if host == "127.0.0.1" else {}
    ray.init(ignore_reinit_error=True, log_to_driver=False, include_dashboard=False, **local)


def stop() -> None:
    """End the server: no new requests, those that run end, memories are closed."""
    serve.delete(APPLICATION)
    serve.shutdown()
    ray.shutdown()
