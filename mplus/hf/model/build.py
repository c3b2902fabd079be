"""Build the parts that a config names: the mechanism, its additions and its retriever."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mplus.config import MPlusConfig, options_of
from mplus.eviction import EVICTION
from mplus.mechanisms import MECHANISMS
from mplus.mechanisms.additions import MemoryAdditions
from mplus.mechanisms.base import MemoryMechanism
from mplus.retrievers import RETRIEVERS
from mplus.retrievers.base import Retriever, RetrieverShape
from mplus.stores import STORES


def build_mechanism(config: MPlusConfig, begin: Tensor, pool: Tensor | None = None) -> MemoryMechanism:
    """Build the mechanism of ``config`` with new additions; ``begin`` is ``[L, 1, d]`` and sets dtype and device.

    Raises:
        UnknownNameError, PluginError, MissingDependencyError: the registry has no such implementation.
        ConfigError: an option of an implementation breaks its rule.
    """
    cls = MECHANISMS.get(config.mechanism.name)
    defaults: Mapping[str, Any] = cls.Options.defaults(config.variant)
    options = options_of(cls, {**defaults, **config.mechanism.options})
    STORES.get(config.store.name)
    EVICTION.get(config.eviction.name)
    retriever = build_retriever(config, begin) if cls.uses_retriever and config.long_term_tokens != 0 else None
    return cls(config, MemoryAdditions(begin, retriever, pool), options)


def build_retriever(config: MPlusConfig, begin: Tensor) -> Retriever:
    """Build the retriever of ``config``; of ``begin``, ``[L, 1, d]``, only the shape counts."""
    cls = RETRIEVERS.get(config.retriever.name)
    shape = RetrieverShape(layers=begin.shape[0], hidden_size=begin.shape[2])
    defaults: Mapping[str, Any] = cls.Options.defaults(config.variant)
    return cls(shape, options_of(cls, {**defaults, **config.retriever.options}))
