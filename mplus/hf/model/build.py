"""Building the parts a config names: additions, mechanism, memories."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from attrs import evolve
from torch import Tensor

from mplus.config import Component, MPlusConfig, options_of
from mplus.errors import ConfigError
from mplus.eviction import EVICTION
from mplus.eviction.build import build_eviction
from mplus.hf.model.engine import DecoderEngine
from mplus.mechanisms import MECHANISMS
from mplus.mechanisms.additions import MemoryAdditions
from mplus.mechanisms.base import MemoryMechanism
from mplus.memory.budget import Budget
from mplus.memory.checks import check_device
from mplus.memory.memory import Memory
from mplus.memory.texts import Texts
from mplus.memory.transaction import Streams
from mplus.retrievers import RETRIEVERS
from mplus.retrievers.base import Retriever, RetrieverShape
from mplus.stores import STORES
from mplus.stores.build import build_store


def build_mechanism(config: MPlusConfig, begin: Tensor, pool: Tensor | None = None) -> MemoryMechanism:
    """The mechanism of ``config`` with new additions; ``begin`` is ``[L, 1, d]`` and sets dtype and device.

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
    """The retriever of ``config``."""
    cls = RETRIEVERS.get(config.retriever.name)
    shape = RetrieverShape(layers=begin.shape[0], hidden_size=begin.shape[2])
    defaults: Mapping[str, Any] = cls.Options.defaults(config.variant)
    return cls(shape, options_of(cls, {**defaults, **config.retriever.options}))


def new_memory(
    engine: DecoderEngine,
    batch_size: int,
    tokenizer: Any,
    seed: int,
    store: Component | None,
    eviction: Component | None,
    device: torch.device | str | None,
    memory_rows: Literal["projected", "hidden", "both"] | None = None,
    bytes_budget: int | str | None = None,
    keep_text: bool = False,
) -> Memory:
    """See ``MemoryModel.new_memory``."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")
    if memory_rows not in (None, "projected", "hidden", "both"):
        raise ConfigError(f"memory_rows must be 'projected', 'hidden' or 'both', got {memory_rows!r}")
    layout = engine.layout if memory_rows is None else engine.layout_of(memory_rows)
    if not isinstance(keep_text, bool):
        raise ConfigError(f"keep_text must be True or False, got {keep_text!r}")
    policy = build_eviction(eviction or engine.config.eviction)
    layout = evolve(
        layout,
        expiry=layout.expiry or policy.lifetime is not None,
        device=layout.device if device is None else check_device(device),
    )
    generators = [torch.Generator().manual_seed(seed + row) for row in range(batch_size)]
    states = [engine.new_state(layout) for _ in range(batch_size)]
    if keep_text:
        texts = [Texts.of(generator.get_state()) for generator in generators]
        states = [evolve(state, texts=kept) for state, kept in zip(states, texts, strict=True)]
    stores = [build_store(store or engine.config.store, layout) for _ in range(batch_size)]
    budget = Budget.of(bytes_budget, engine.config, engine.mechanism, stores[0], batch_size)
    return Memory(Streams(engine, states, stores, generators, policy, budget), tokenizer)
