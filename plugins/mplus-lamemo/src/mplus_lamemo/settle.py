"""The configuration of LaMemo: what is left open, and what means nothing to it."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import evolve

from mplus.config import ADAPTERS, MPlusConfig, shortest_chunk
from mplus.errors import ConfigError

UNUSED = {
    "retrieved_tokens": ((None, 0), "nothing is retrieved"),
    "drop_per_layer": ((True,), "nothing is dropped at random"),
    "memory_positions": (("auto", "sequential"), "the window sits right in front of the text"),
    "position_span": ((None,), "the window sits right in front of the text"),
}
"""Fields of a config that mean nothing here: their values when they are left out, and why."""


def settled(config: MPlusConfig, room: int | None, sizes: Mapping[str, int]) -> MPlusConfig:
    """Return ``config`` with everything said; see ``MemoryMechanism.settle``.

    There is no long-term memory, whatever ``long_term_tokens`` says.

    Args:
        config: as it was given to ``wrap``.
        room: half of the decoder's positions; None: there is no limit.
        sizes: of segment and window, as far as there is room.

    Raises:
        ConfigError: a field is set that means nothing to LaMemo.
    """
    for name, (values, why) in UNUSED.items():
        if getattr(config, name) not in values:
            raise ConfigError(
                f"{name} means nothing to the mechanism 'lamemo' ({why}), got {getattr(config, name)!r}: leave it out"
            )
    chunk: int | None = config.chunk_tokens
    window: int | None = config.short_term_tokens
    chunk = min(sizes["chunk_tokens"], room or sizes["chunk_tokens"]) if chunk is None else chunk
    window = min(sizes["short_term_tokens"], room or sizes["short_term_tokens"]) if window is None else window
    if config.memory_tokens_per_chunk not in (None, min(chunk, window)):
        raise ConfigError(
            f"memory_tokens_per_chunk means nothing to the mechanism 'lamemo' (every token is a place), got "
            f"{config.memory_tokens_per_chunk}: leave it out"
        )
    shortest = 1 if config.min_chunk_tokens in (None, shortest_chunk(chunk)) else config.min_chunk_tokens
    return evolve(
        config,
        chunk_tokens=chunk,
        min_chunk_tokens=shortest,
        memory_tokens_per_chunk=min(chunk, window),
        short_term_tokens=window,
        retrieved_tokens=0,
        long_term_tokens=0,
        adapters=None if config.adapters is ADAPTERS else config.adapters,
    )
