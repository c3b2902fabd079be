"""How many engines a server has: a fixed number, or by the requests that wait for a place in a batch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from attrs import define, field

from mplus.config import JsonValue, whole
from mplus.errors import ConfigError

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

UPSCALE_SECONDS = 5.0
"""Seconds that more engines must be wanted for, before they are started."""
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

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, JsonValue]]:
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


@define(frozen=True, kw_only=True)
class Engines:
    """The number of engines, and what each needs.

    Attributes:
        fewest, most: equal: as many, always; else by the requests that wait.
        resources: of Ray for each, such as ``{"num_cpus": 8, "num_gpus": 1}``.

    Raises:
        ConfigError: ``fewest`` is above ``most``.
    """

    fewest: int = field(default=1, validator=whole(1))
    most: int = field(default=1, validator=whole(1))
    resources: Mapping[str, float] = field(factory=lambda: {"num_cpus": 1})

    def __attrs_post_init__(self) -> None:
        if self.fewest > self.most:
            raise ConfigError(f"fewest must be at most {self.most}, the most engines, got {self.fewest}")

    @staticmethod
    def parse(text: str, resources: Mapping[str, float]) -> Engines:
        """Return the engines of "2" or "1-8". Raises ConfigError."""
        found = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", text)
        if found is None:
            raise ConfigError(f"engines must be a number, or two as in 1-8, got {text!r}")
        return Engines(fewest=int(found[1]), most=int(found[2] or found[1]), resources=resources)

    def options(self, places: int) -> dict[str, Any]:
        """Return the options of Ray's deployment; ``places``: answers that one engine generates at once."""
        if self.fewest == self.most:
            return {"num_replicas": self.fewest}
        from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

        policy = AutoscalingPolicy(policy_function=WantedEngines, policy_kwargs={"places": places})
        return {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=self.fewest, max_replicas=self.most, policy=policy, upscale_delay_s=UPSCALE_SECONDS
            )
        }
