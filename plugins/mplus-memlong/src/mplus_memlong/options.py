"""The options of MemLong, and the sizes of its memory."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from attrs import define, evolve, field

from mplus.config import ADAPTERS, LONG_TERM_TOKENS, JsonValue, MPlusConfig, flag, is_whole, must_be, one_of, whole
from mplus.errors import ConfigError
from mplus_memlong.eviction import WAYS

SIZES = {"chunk_tokens": 1024, "retrieved_tokens": 1024}
"""As published: 8 groups of 128 tokens come back."""
GROUP_TOKENS = 128
BANK_TOKENS = 32_768
"""The published capacity, of a config that says nothing of it."""

UNUSED = {
    "short_term_tokens": (None, "there is no short-term memory"),
    "drop_per_layer": (True, "nothing is dropped at random"),
    "memory_positions": ("auto", "its option positions says where rows sit"),
    "position_span": (None, "its option positions says where rows sit"),
    "retriever": (MPlusConfig().retriever, "its option encoder says how groups are found"),
}
"""Fields of a config that mean nothing here: their values when they are left out, and why."""


def _layers(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _are_layers(value: Any) -> bool:
    return value is None or (
        isinstance(value, tuple)
        and bool(value)
        and all(is_whole(one, 0) for one in value)
        and all(one < other for one, other in pairwise(value))
    )


percent = must_be("a whole number from 0 to 100", lambda value: is_whole(value, 0) and value <= 100)


@define(frozen=True, kw_only=True)
class MemLongOptions:
    """Options of MemLong. Layers are numbered among those that carry memory.

    Attributes:
        memory_layer: whose keys and values are kept; None: the middle one (13 of 26, as published).
        read_layers: that attend to what was found, none of them below ``memory_layer``, ascending; None: four of them,
            evenly spread from there to the last but (published: 13, 17, 21, 25).
        group_tokens: tokens that are found together; None: 128, or a chunk where that is shorter.
        positions: of rows. "zero": all at 0, the text at 1, 2, ... "continual": at 0, 1, ... M - 1, the text behind.
            "cumulative": what the released code makes of "Continual", where each layer that reads turns keys further.
        gate: scores of memory times s(g), those of the text times 1 - s(g), with g of each head and layer, at first 0.
        query: what a text asks with of which a call does not say it (``query_tokens``, ``retrieval_query``, or the
            prompt of a generation). "before": the newest group, which stands before it, so that no token sees what was
            chosen by a later one. "text": all of the text itself, as released.
        evict: who leaves a full bank: "counters", "half", "released" or "policy" (``MPlusConfig.eviction``).
        lower, upper: of "counters", in percent: the oldest groups leave up to there, the newest stay from there on.
        bank_dtype: of keys and values; None: that of the decoder.
        encoder: name or folder of an encoder of sentence-transformers; None: the decoder's own hidden states.
        encoder_layer: whose inputs these are; 0: the embeddings of tokens. None: a quarter of the way up (7 of 30). In
            the middle of a decoder and above, means over texts hardly differ, and none of them is found again.
        encoder_tokens: of a text to ask with, at most so many, the last ones.
        equal_counts: all texts of a batch read equally many groups, as many as the poorest stream has.
        exact_groups: a bank of more groups is searched by faiss.
    """

    memory_layer: int | None = field(default=None, validator=whole(0, optional=True))
    read_layers: tuple[int, ...] | None = field(
        default=None, converter=_layers, validator=must_be("an ascending list of layers, or None", _are_layers)
    )
    group_tokens: int | None = field(default=None, validator=whole(1, optional=True))
    positions: str = field(default="zero", validator=one_of("zero", "continual", "cumulative"))
    gate: bool = field(default=False, validator=flag)
    query: str = field(default="before", validator=one_of("before", "text"))
    evict: str = field(default="counters", validator=one_of(*WAYS))
    lower: int = field(default=10, validator=percent)
    upper: int = field(default=90, validator=percent)
    bank_dtype: str | None = field(default=None, validator=one_of(None, "float32", "bfloat16", "float16"))
    encoder: str | None = field(
        default=None,
        validator=must_be("the name of an encoder, or None", lambda v: v is None or (isinstance(v, str) and bool(v))),
    )
    encoder_layer: int | None = field(default=None, validator=whole(0, optional=True))
    encoder_tokens: int = field(default=512, validator=whole(1))
    equal_counts: bool = field(default=False, validator=flag)
    exact_groups: int = field(default=20_000, validator=whole(1))

    def __attrs_post_init__(self) -> None:
        if self.lower > self.upper:
            raise ConfigError(f"lower must be at most upper ({self.upper}), got {self.lower}")
        if self.encoder is not None and self.encoder_layer is not None:
            raise ConfigError(
                f"encoder_layer is of the decoder's own hidden states, which are not used beside encoder "
                f"{self.encoder!r}, got {self.encoder_layer}: leave one of them out"
            )

    @classmethod
    def defaults(cls, variant: str) -> dict[str, JsonValue]:
        """Return what the released code does otherwise."""
        if variant != "published":
            return {}
        return {"query": "text", "evict": "released", "bank_dtype": "bfloat16", "equal_counts": True}


def group_tokens(chunk: int, retrieved: int) -> int:
    """Return the tokens of a group where the options do not say it: those that are published, or as many as fit."""
    return min(GROUP_TOKENS, chunk, retrieved)


def settled(config: MPlusConfig, room: int | None) -> MPlusConfig:
    """Return ``config`` with everything said; see ``Mechanism.settle``.

    Args:
        config: as it was given to ``wrap``.
        room: positions of the decoder that memory should take at most; None: there is no limit.

    Raises:
        ConfigError: a field is set that means nothing to the mechanism, or a size is too small.
    """
    for name, (left_out, why) in UNUSED.items():
        if getattr(config, name) != left_out:
            raise ConfigError(
                f"{name} means nothing to the mechanism 'memlong' ({why}), got {getattr(config, name)!r}: leave it out"
            )
    own: Mapping[str, JsonValue] = config.mechanism.options
    if config.eviction.name != "fifo" and own.get("evict") != "policy":
        raise ConfigError(
            f"eviction {config.eviction.name!r} is used with the mechanism 'memlong' only where its option evict is "
            f"'policy', got {own.get('evict', MemLongOptions.defaults(config.variant).get('evict', 'counters'))!r}"
        )
    wanted = config.retrieved_tokens
    most = SIZES["retrieved_tokens"] if room is None else min(SIZES["retrieved_tokens"], room)
    chunk = config.chunk_tokens
    if chunk is None:
        chunk = SIZES["chunk_tokens"] if room is None else max(min(SIZES["chunk_tokens"], room), 1)
    given = own.get("group_tokens")
    group = given if is_whole(given, 1) else group_tokens(chunk, wanted or max(most, 1))
    retrieved = max(most, group) if wanted is None else wanted
    limit = BANK_TOKENS if config.long_term_tokens is LONG_TERM_TOKENS else config.long_term_tokens
    for name, size in (("retrieved_tokens", retrieved), ("long_term_tokens", limit)):
        if size is not None and size < group:
            raise ConfigError(
                f"{name} must be at least group_tokens ({group}) with the mechanism 'memlong', which keeps and finds "
                f"whole groups, got {size}"
            )
    if config.memory_tokens_per_chunk not in (None, chunk):
        raise ConfigError(
            f"memory_tokens_per_chunk means nothing to the mechanism 'memlong' (every token is a row, so it is "
            f"chunk_tokens, {chunk}), got {config.memory_tokens_per_chunk}: leave it out"
        )
    return evolve(
        config,
        chunk_tokens=chunk,
        min_chunk_tokens=config.min_chunk_tokens or 1,
        memory_tokens_per_chunk=chunk,
        retrieved_tokens=retrieved,
        long_term_tokens=limit,
        adapters=None if config.adapters is ADAPTERS else config.adapters,
    )
