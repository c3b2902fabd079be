"""``mplus serve --ray``: the engines of a server on Ray."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import attrs

from mplus.errors import ConfigError

if TYPE_CHECKING:
    from mplus.serving.config import ServeConfig
    from mplus.serving.engine.source import DecoderSource
    from mplus.serving.messages import EngineClient


def engines_on_ray(source: DecoderSource, config: ServeConfig, engines: str, gpus: float) -> EngineClient:
    """Start engines on Ray, or join those that run there, and return a client of them.

    Args:
        source: of the decoder; each engine computes with its threads.
        config: of the server.
        engines: "2", or the fewest and the most, as in "1-8".
        gpus: of each engine.

    Raises:
        ConfigError: Ray is not installed, or ``engines`` is neither.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("--ray needs Ray: pip install 'mplus[ray]'")
    from mplus.serving.ray.cluster import Cluster
    from mplus.serving.ray.replica import EngineSettings
    from mplus.serving.ray.scaling import Engines

    wanted = Engines.parse(engines, {"num_cpus": source.threads or 1, "num_gpus": gpus})
    shared = attrs.evolve(config, memories=config.memories.resolve())  # engines run in folders of their own
    source = attrs.evolve(source, threads=source.threads or 1)
    return Cluster().start(EngineSettings(source=source, config=shared), wanted)
