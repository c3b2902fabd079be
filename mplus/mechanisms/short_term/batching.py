"""Which memories of M+ and MemoryLLM can be held together as one tensor per layer."""

from __future__ import annotations

from typing import Any

import attrs

from mplus.config import Component, MPlusConfig, options_of
from mplus.errors import ConfigError
from mplus.mechanisms import MECHANISMS
from mplus.mechanisms.build import memory_mechanism

BATCHED = ("mplus", "memoryllm")
"""Mechanisms whose streams can be held together."""
EVICTION = Component("fifo")


def check_batched(memory: MPlusConfig, *, long_term: bool) -> None:
    """Refuse a configuration that batched streams would not follow, for whoever needs these and no others.

    Settings of long-term memory matter only to streams that have one (``long_term``).

    Raises:
        ConfigError: a mechanism or a setting that they do not follow; named.
        UnknownNameError: no mechanism has the name.
    """
    name = memory.mechanism.name
    if name not in BATCHED:
        raise ConfigError(
            f"mechanism must be {' or '.join(map(repr, BATCHED))} here, got {name!r} ({MECHANISMS.origin(name)}): "
            "evaluations that hold many memories as dense tensors know the rows of these two, so that absorb and "
            f"retrieve of {name!r} would never be called. Take one of the two, or measure {name!r} with another "
            "evaluation, or with a program of your own, by memory.write and model(..., memory=memory)"
        )
    if long_term and not memory_mechanism(name).uses_retriever:
        raise ConfigError(
            f"mechanism {name!r} has no long-term memory, and streams with one were asked for: "
            "set long_term to false and long_term_tokens to 0, or take the mechanism 'mplus'"
        )
    changed = changed_options(memory)
    if changed and (long_term or name == "memoryllm"):
        raise ConfigError(
            f"options of the mechanism {name!r} must be left out here, got {', '.join(changed)}: memories that are "
            "held as dense tensors would ignore them. Leave them out, and wrap the trained decoder with them"
        )
    if long_term and memory.eviction != EVICTION:
        raise ConfigError(
            f"eviction must be 'fifo' for streams with long-term memory, got {memory.eviction.plain()!r}: in memories "
            "that are held as dense tensors the oldest rows make room. Leave it out, and give the policy to "
            "new_memory of the trained decoder"
        )


def can_be_batched(memory: MPlusConfig, *, long_term: bool) -> bool:
    """Return whether batched streams follow all of a configuration."""
    changed = changed_options(memory)
    known = memory.mechanism.name in BATCHED and memory.variant == "paper"
    return (
        known
        and not (changed and (long_term or memory.mechanism.name == "memoryllm"))
        and (not long_term or memory.eviction == EVICTION)
    )


def changed_options(memory: MPlusConfig) -> list[str]:
    """Return ``name=value`` of the mechanism's options that differ from their defaults."""
    cls: Any = MECHANISMS.get(memory.mechanism.name)
    options, defaults = options_of(cls, memory.mechanism.options), cls.Options()
    values = attrs.asdict(options)
    return [f"{name}={value!r}" for name, value in values.items() if value != getattr(defaults, name)]
