"""WantedEngines: how many engines a server is to have, by the requests that wait for a place in a batch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

WAITING_PER_ENGINE = 8
"""Requests that may wait at each engine, on average, before there are to be more."""


class WantedEngines:
    """A policy for Ray's autoscaling: more engines where requests wait, one fewer where the others have room for all.

    Ray asks every few seconds, keeps the number within its bounds, and acts on it once it has lasted for a while.

    Args:
        places: answers that one engine generates at once.
    """

    def __init__(self, places: int) -> None:
        self.places = places

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Return the number of engines to have, and what to remember (nothing)."""
        told = context.aggregated_metrics or {}
        waiting, running = (sum(told.get(name, {}).values()) for name in ("requests_waiting", "requests_running"))
        return self.wanted(context.current_num_replicas, waiting, running), {}

    def wanted(self, engines: int, waiting: float, running: float) -> int:
        """Return the number of engines to have, of which there are ``engines`` now.

        Args:
            engines: that there are.
            waiting, running: requests at all of them.
        """
        if waiting > WAITING_PER_ENGINE * engines:
            return math.ceil(waiting / WAITING_PER_ENGINE)
        # Half of the places stay free, so that an engine that has just gone is not wanted again at once.
        return engines - 1 if engines > 1 and not waiting and running <= (engines - 1) * self.places / 2 else engines
