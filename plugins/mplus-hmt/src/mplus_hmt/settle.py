"""The configuration of HMT: what is left open, and what means nothing to it."""

from __future__ import annotations

from attrs import evolve

from mplus.config import ADAPTERS, LONG_TERM_TOKENS, MPlusConfig, shortest_chunk
from mplus.errors import ConfigError

SEGMENT = 1024
"""Positions of a segment with all that stands around it (``--segment_length`` of the released scripts)."""
LISTED = {"paper": 300, "published": 100}
"""N: vectors that a list holds, by variant."""
UNUSED = {
    "short_term_tokens": ((None,), "there is no short-term memory"),
    "memory_tokens_per_chunk": ((None, 1), "a segment leaves one vector"),
    "retrieved_tokens": ((None, 0), "all vectors are recalled from"),
    "drop_per_layer": ((True,), "nothing is dropped at random"),
    "position_span": ((None,), "what is read sits at consecutive positions"),
}
"""Fields of a config that mean nothing here: their values when they are left out, and why."""


def settled(config: MPlusConfig, room: int | None, sensory_tokens: int) -> MPlusConfig:
    """Return ``config`` with everything said; see ``MemoryMechanism.settle``.

    Args:
        config: as it was given to ``wrap``.
        room: half of the decoder's positions; None: there is no limit.
        sensory_tokens: k.

    Raises:
        ConfigError: a field is set that means nothing to HMT, or a size is too small.
    """
    for name, (values, why) in UNUSED.items():
        if getattr(config, name) not in values:
            raise ConfigError(
                f"{name} means nothing to the mechanism 'hmt' ({why}), got {getattr(config, name)!r}: leave it out"
            )
    whole = SEGMENT if room is None else min(SEGMENT, 2 * room)
    chunk: int | None = config.chunk_tokens
    if chunk is None:
        chunk = whole - 2 - sensory_tokens
        if chunk < 1:
            raise ConfigError(
                f"sensory_tokens must leave room for a segment in {whole} positions, got {sensory_tokens}: give fewer"
            )
    listed = LISTED[config.variant] if config.long_term_tokens is LONG_TERM_TOKENS else config.long_term_tokens
    if listed == 0:
        raise ConfigError(
            "long_term_tokens must be at least 1 with the mechanism 'hmt', which keeps vectors there, got 0"
        )
    shortest = 1 if config.min_chunk_tokens in (None, shortest_chunk(chunk)) else config.min_chunk_tokens
    return evolve(
        config,
        chunk_tokens=chunk,
        min_chunk_tokens=shortest,  # left out: the last segment is as short as it is
        memory_tokens_per_chunk=1,
        retrieved_tokens=0,
        long_term_tokens=listed,
        adapters=None if config.adapters is ADAPTERS else config.adapters,
    )
