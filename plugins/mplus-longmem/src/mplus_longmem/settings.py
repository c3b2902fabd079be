"""The configuration of LongMem: its options, the sizes that are left open, and what means nothing."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import define, evolve, field

from mplus.config import ADAPTERS, LONG_TERM_TOKENS, Component, JsonValue, MPlusConfig, flag, one_of, whole
from mplus.errors import ConfigError
from mplus.mechanisms import MemoryMechanism

MEMORY_TOKENS = 65_536
"""M, text tokens that a bank holds where the configuration does not say (published)."""

UNUSED = {
    "short_term_tokens": (None, "there is no short-term memory"),
    "drop_per_layer": (True, "nothing is dropped at random"),
    "memory_positions": ("auto", "keys of the bank have no positions"),
    "position_span": (None, "keys of the bank have no positions"),
    "query_tokens": (None, "every token searches by itself"),
    "retriever": (Component("linear"), "the queries of the side network search in the bank's own keys"),
}
"""Fields of a config that mean nothing here: their values when they are left out, and why."""


@define(frozen=True, kw_only=True)
class LongMemOptions(MemoryMechanism.Options):
    """Options of LongMem. What is marked with a number is a defect of the published code, and on in its variant.

    Attributes:
        layer: r, the decoder layer whose keys and values are kept, from 0; None: that of three quarters of the depth
            (17 of 24, as published).
        reduction: f, decoder layers to a side layer.
        chunk_size: c, tokens of a chunk, which is one row of the bank.
        bank_dtype: of what is kept, "float16" in the published variant; None: that of the decoder.
        normed_last: (L9) the last residual is taken behind the decoder's final norm, so that it mixes a normed state
            with one that is not.
        shared_bank: (L10) what is written of a batch is one bank for all of its rows, and chunks run on from one row
            into the next.
        drop_remainder: tokens at the end of a text that do not fill a chunk are dropped; else the last one is shorter.
        evict_double: before a write that would fill the bank, twice as many chunks leave as are written; else as many
            as have no room.
        zero_neighbours: where a bank holds fewer chunks than are read, zeros take part in the softmax.
    """

    layer: int | None = field(default=None, validator=whole(0, optional=True))
    reduction: int = field(default=2, validator=whole(1))
    chunk_size: int = field(default=4, validator=whole(1))
    bank_dtype: str | None = field(default=None, validator=one_of(None, "float16", "bfloat16", "float32", "float64"))
    normed_last: bool = field(default=False, validator=flag)
    shared_bank: bool = field(default=False, validator=flag)
    drop_remainder: bool = field(default=False, validator=flag)
    evict_double: bool = field(default=False, validator=flag)
    zero_neighbours: bool = field(default=False, validator=flag)

    @classmethod
    def defaults(cls, variant: str) -> dict[str, JsonValue]:
        """Return what the variant "published" has turned on."""
        if variant == "paper":
            return {}
        defects = ("normed_last", "shared_bank", "drop_remainder", "evict_double", "zero_neighbours")
        return {"bank_dtype": "float16", **dict.fromkeys(defects, True)}


def settled(config: MPlusConfig, room: int | None, sizes: Mapping[str, int], chunk_size: int) -> MPlusConfig:
    """Return ``config`` with everything said; see ``Mechanism.settle``.

    Args:
        config: as it was given to ``wrap``.
        room: half of the decoder's positions; None: there is no limit.
        sizes: those that are used where a config leaves them open.
        chunk_size: tokens of a row.

    Raises:
        ConfigError: a field is set that means nothing to the mechanism, or a size is too small.
    """
    for name, (left_out, why) in UNUSED.items():
        if getattr(config, name) != left_out:
            raise ConfigError(
                f"{name} means nothing to the mechanism 'longmem' ({why}), got {getattr(config, name)!r}: leave it out"
            )
    segment = config.chunk_tokens
    if segment is None:
        segment = sizes["chunk_tokens"] if room is None else min(sizes["chunk_tokens"], 2 * room)
    retrieved = sizes["retrieved_tokens"] if config.retrieved_tokens is None else config.retrieved_tokens
    limit = config.long_term_tokens
    if limit is LONG_TERM_TOKENS:
        limit = max(MEMORY_TOKENS // chunk_size, 1)
    for name, size in (("retrieved_tokens", retrieved), ("long_term_tokens", limit)):
        if size is not None and size < 1:
            raise ConfigError(f"{name} must be at least 1 chunk with the mechanism 'longmem', got {size}")
    return evolve(
        config,
        chunk_tokens=segment,
        min_chunk_tokens=config.min_chunk_tokens or 1,
        memory_tokens_per_chunk=-(-segment // chunk_size),
        retrieved_tokens=retrieved,
        long_term_tokens=limit,
        adapters=None if config.adapters is ADAPTERS else config.adapters,
    )
