"""The configuration of a memory of keys and values: what is left open, and what means nothing."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import evolve

from mplus.config import ADAPTERS, LONG_TERM_TOKENS, Component, JsonValue, MPlusConfig, shortest_chunk
from mplus.errors import ConfigError

UNUSED = {
    "short_term_tokens": (None, "there is no short-term memory"),
    "variant": ("paper", "there are no published weights to follow"),
    "drop_per_layer": (True, "nothing is dropped at random"),
    "memory_positions": ("auto", "the rows sit at consecutive positions in front of the text"),
    "position_span": (None, "the rows sit at consecutive positions in front of the text"),
}
"""Fields of a config that mean nothing here: their values when they are left out, and why."""

LEFT_OUT = Component("linear")
"""The retriever of a config that says nothing of it, which is one of rows."""


def settled(config: MPlusConfig, room: int | None, sizes: Mapping[str, int], retriever: Component) -> MPlusConfig:
    """Return ``config`` with everything said; see ``MemoryMechanism.settle``.

    Args:
        config: as it was given to ``wrap``.
        room: positions of the decoder that memory should take at most; None: there is no limit.
        sizes: those that are used where a config leaves them open, as far as there is room.
        retriever: likewise.

    Raises:
        ConfigError: a field is set that means nothing to the mechanism, or a size is too small.
    """
    for name, (left_out, why) in UNUSED.items():
        if getattr(config, name) != left_out:
            raise ConfigError(
                f"{name} means nothing to the mechanism 'kv' ({why}), got {getattr(config, name)!r}: leave it out"
            )
    _check_options(config)
    most = sizes["retrieved_tokens"] if room is None else min(sizes["retrieved_tokens"], room)
    retrieved: int | None = config.retrieved_tokens
    chunk = config.chunk_tokens
    if chunk is None:
        chunk = max(min(sizes["chunk_tokens"], most // 2 if retrieved is None else retrieved), 1)
    retrieved = max(most, chunk) if retrieved is None else retrieved
    if config.memory_tokens_per_chunk not in (None, chunk):
        raise ConfigError(
            f"memory_tokens_per_chunk means nothing to the mechanism 'kv' (every token is a row, so it is "
            f"chunk_tokens, {chunk}), got {config.memory_tokens_per_chunk}: leave it out"
        )
    if config.min_chunk_tokens not in (None, 1, shortest_chunk(chunk)):  # the last: of earlier versions
        raise ConfigError(
            f"min_chunk_tokens means nothing to the mechanism 'kv', which takes texts of any length, got "
            f"{config.min_chunk_tokens}: leave it out"
        )
    # Whoever sets no limit expects none: text that leaves silently would be told in vain.
    limit = None if config.long_term_tokens is LONG_TERM_TOKENS else config.long_term_tokens
    for name, size in (("retrieved_tokens", retrieved), ("long_term_tokens", limit)):
        if size is not None and size < chunk:
            raise ConfigError(
                f"{name} must be at least chunk_tokens ({chunk}) with the mechanism 'kv', which keeps and "
                f"brings back whole chunks, got {size}"
            )
    return evolve(
        config,
        chunk_tokens=chunk,
        min_chunk_tokens=1,
        memory_tokens_per_chunk=chunk,
        retrieved_tokens=retrieved,
        long_term_tokens=limit,
        retriever=retriever if config.retriever == LEFT_OUT else config.retriever,
        adapters=None if config.adapters is ADAPTERS else config.adapters,
    )


def _check_options(config: MPlusConfig) -> None:
    """Raise ConfigError where an option of the mechanism and a field of the config do not go together."""
    options = config.mechanism.options
    own = options.get("min_score")
    if config.min_score is not None and own is not None and own != config.min_score:
        raise ConfigError(
            f"min_score must be given once, or be the same number as the option of the mechanism 'kv' ({own!r}), got "
            f"{config.min_score!r}"
        )
    for name in ("long_term_tokens", "bytes_budget"):
        limit = getattr(config, name)
        if limit is not None and limit is not LONG_TERM_TOKENS:
            check_limited(name, options.get("context_chunks", 0))


def check_limited(name: str, context_chunks: JsonValue) -> None:
    """Raise ConfigError where chunks could outlive others that they were written behind.

    Computing them anew as the others leave would cost all later chunks of the source for every chunk that is written.

    Args:
        name: of what sets a limit to a memory.
        context_chunks: the option of the mechanism.
    """
    if context_chunks != 0:
        raise ConfigError(
            f"{name} does not go with the option context_chunks of the mechanism 'kv', got {context_chunks!r}: chunks "
            "hold something of those that they were written behind, which would leave first; leave out one of the two"
        )
