"""Retrievers by name."""

from __future__ import annotations

from collections.abc import Mapping

from mplus.config import JsonValue, MPlusConfig, options_of
from mplus.retrievers import RETRIEVERS
from mplus.retrievers.base import Retriever, RetrieverShape


def build_retriever(config: MPlusConfig, shape: RetrieverShape) -> Retriever:
    """Build the retriever of ``config``. Raises UnknownNameError, PluginError or ConfigError."""
    cls = RETRIEVERS.get(config.retriever.name)
    defaults: Mapping[str, JsonValue] = cls.Options.defaults(config.variant)
    return cls(shape, options_of(cls, {**defaults, **config.retriever.options}))
