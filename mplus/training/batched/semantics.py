"""What batched memories can follow of a configuration: they compute M+ and MemoryLLM themselves."""

from __future__ import annotations

from typing import Any

import attrs

from mplus.config import Component, MPlusConfig, options_of
from mplus.errors import ConfigError
from mplus.mechanisms import MECHANISMS

FOLLOWED = ("mplus", "memoryllm")
"""Mechanisms whose writes and reads batched memories compute, without calling them."""
EVICTION = Component("fifo")


def check_semantics(memory: MPlusConfig, *, long_term: bool) -> None:
    """Refuse a configuration that batched memories would not follow.

    Settings of long-term memory matter only to streams that have one (``long_term``): others leave them to the memories
    of the trained decoder.

    Raises:
        ConfigError: a mechanism whose code would never be called, or a setting that would be ignored; named.
        UnknownNameError: no mechanism has the name.
    """
    name = memory.mechanism.name
    if name not in FOLLOWED:
        raise ConfigError(
            f"mechanism must be {' or '.join(map(repr, FOLLOWED))} here, got {name!r} ({MECHANISMS.origin(name)}): "
            "training, and evaluations that hold many memories as dense tensors, compute the writes and reads of these "
            f"two themselves, so that plan_write, absorb and retrieve of {name!r} would never be called. Take one of "
            f"the two, or train and measure {name!r} with a program of your own, by memory.write and "
            "model(..., memory=memory)"
        )
    if long_term and not MECHANISMS.get(name).uses_retriever:
        raise ConfigError(
            f"mechanism {name!r} has no long-term memory, and streams with one were asked for: "
            "set long_term to false and long_term_tokens to 0, or take the mechanism 'mplus'"
        )
    changed = _changed_options(memory)
    if changed and (long_term or name == "memoryllm"):
        raise ConfigError(
            f"options of the mechanism {name!r} must be left out here, got {', '.join(changed)}: memories that are "
            "held as dense tensors, in training and in evaluation, would ignore them. Leave them out, and wrap the "
            "trained decoder with them"
        )
    if long_term and memory.eviction != EVICTION:
        raise ConfigError(
            f"eviction must be 'fifo' for streams with long-term memory, got {memory.eviction.plain()!r}: in memories "
            "that are held as dense tensors, in training and in evaluation, the oldest rows make room. Leave it out, "
            "and give the policy to new_memory of the trained decoder"
        )


def _changed_options(memory: MPlusConfig) -> list[str]:
    """Return ``name=value`` of the mechanism's options that differ from their defaults."""
    cls: Any = MECHANISMS.get(memory.mechanism.name)
    options, defaults = options_of(cls, memory.mechanism.options), cls.Options()
    values = attrs.asdict(options)
    return [f"{name}={value!r}" for name, value in values.items() if value != getattr(defaults, name)]
