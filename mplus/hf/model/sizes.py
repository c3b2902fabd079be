"""The sizes of a memory that a config leaves open: as published where a decoder's positions hold them, else smaller."""

from __future__ import annotations

import warnings
from typing import Any, TypedDict

from attrs import define, evolve
from transformers import PreTrainedConfig, PreTrainedModel

from mplus.config import PUBLISHED, MPlusConfig, shortest_chunk
from mplus.errors import MechanismError, MemorySizeWarning
from mplus.hf.retrofit.positions import MemoryPositions
from mplus.mechanisms import MECHANISMS
from mplus.mechanisms.build import memory_mechanism

PARTS = 1 << 16
"""Steps in which sizes are scaled: a scale is a whole number of so many parts."""
NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_sequence_length")
"""What configurations call the number of positions."""
STRETCHED = ("yarn", "dynamic")
"""Rotary embeddings that reach ``factor`` times as far as ``original_max_position_embeddings``, or what is in its
place, says; for others configurations say the number that was reached."""


@define(frozen=True)
class Room:
    """The positions that a decoder knows, and how many of them memory takes.

    Attributes:
        positions: the number it was made for; None: it does not say, or distance does not enter its attention (ALiBi).
        layout: where memory rows sit.
        decoder: name of the decoder's class.
        placed: whether memory rows have positions at all, which can then be compressed.
        grows: rotary frequencies follow the longest sequence, so that no position is the last.
    """

    positions: int | None
    layout: MemoryPositions
    decoder: str
    placed: bool = True
    grows: bool = False

    @staticmethod
    def of(decoder: PreTrainedModel, layout: MemoryPositions, *, placed: bool = True) -> Room:
        """Return the room in ``decoder``, by its configuration."""
        config = decoder.config.get_text_config(decoder=True)
        positions = None if layout.layout == "constant" else known_positions(config)
        grows = _rotary(config).get("rope_type") == "dynamic"
        return Room(positions, layout, type(decoder).__name__, placed, grows)

    @property
    def half(self) -> int | None:
        """Positions that memory may take: the other half is for text."""
        return None if self.positions is None else max(self.positions // 2, 2)

    def taken(self, sizes: dict[str, int], config: MPlusConfig) -> int:
        """Return the positions that a read's memory rows take: 1 + K0 + N, unless they are compressed."""
        return self.layout.extent(1 + _retrieved(sizes, config) + sizes["short_term_tokens"])

    def written(self, sizes: dict[str, int]) -> int:
        """Return the positions that a write takes: begin row, context and chunk."""
        return self.layout.extent(1 + sizes["memory_tokens_per_chunk"]) + sizes["chunk_tokens"]

    def holds(self, sizes: dict[str, int], config: MPlusConfig) -> bool:
        """Return whether the memory of a read takes at most half of the positions."""
        return self.half is None or self.taken(sizes, config) <= self.half

    def takes(self, sizes: dict[str, int]) -> bool:
        """Return whether a write takes at most all positions."""
        return self.positions is None or self.written(sizes) <= self.positions


def _retrieved(sizes: dict[str, int], config: MPlusConfig) -> int:
    retrieves = config.long_term_tokens != 0 and memory_mechanism(config.mechanism.name).uses_retriever
    return sizes["retrieved_tokens"] if retrieves else 0


def known_positions(config: PreTrainedConfig) -> int | None:
    """Return the number of positions a decoder was made for.

    A sliding window is no limit: all layers see all memory.
    """
    given = [getattr(config, name, None) for name in NAMES]
    known = next((n for n in given if isinstance(n, int) and not isinstance(n, bool) and n > 0), None)
    scaling = _rotary(config)
    factor = scaling.get("factor")
    if known is None or scaling.get("rope_type") not in STRETCHED or not isinstance(factor, int | float):
        return known
    return max(known, int(factor * (scaling.get("original_max_position_embeddings") or known)))


class RotarySettings(TypedDict, total=False):
    """The settings of a rotary embedding that are looked at here, as transformers names them."""

    rope_type: str
    factor: float | None
    original_max_position_embeddings: int | None


def _rotary(config: PreTrainedConfig) -> RotarySettings:
    """Return the rotary embedding's settings; {}: it has none."""
    settings: RotarySettings | None = getattr(config, "rope_parameters", None)
    return settings or {}


def resolve(config: MPlusConfig, room: Room, stacklevel: int = 2) -> MPlusConfig:
    """Give ``config`` a number for every size that it leaves open.

    The published sizes, if a read's memory, ``1 + retrieved_tokens + short_term_tokens`` rows, takes at most half of
    the decoder's positions with them. Else all sizes that are open are scaled together, until it takes half.

    A mechanism may have other defaults (``MemoryMechanism.settle``).

    Raises:
        MechanismError: ``settle`` leaves a size open that every memory has.

    Warns:
        MemorySizeWarning: sizes that are given do not fit.
    """
    settled = MECHANISMS.get(config.mechanism.name).settle(config, room.half)
    if settled is not None:
        for name in ("chunk_tokens", "min_chunk_tokens", "memory_tokens_per_chunk"):
            if getattr(settled, name) is None:
                raise MechanismError(
                    f"the mechanism {config.mechanism.name!r}: settle must return a config with a number for {name}, "
                    "got None"
                )
        if room.half is not None and (settled.retrieved_tokens or 0) > room.half and not room.grows:
            warnings.warn(
                f"a read puts up to retrieved_tokens ({settled.retrieved_tokens:,}) rows in front of the text and "
                f"{room.decoder} knows {room.positions:,} positions, of which memory should take at most half, "
                f"{room.half:,}: use a smaller number, or leave it out",
                MemorySizeWarning,
                stacklevel=stacklevel + 1,
            )
        return settled
    given = {name: getattr(config, name) for name in PUBLISHED if getattr(config, name) is not None}
    scale = _scale(given, config, room)
    if scale is None:  # what is given does not fit by itself: the rest is as it would be without
        scale = _scale({}, config, room) or 0
    sizes = _scaled(scale, given, config)
    if "chunk_tokens" not in given and not room.takes(sizes):
        excess = room.written(sizes) - (room.positions or 0)
        sizes["chunk_tokens"] = max(sizes["chunk_tokens"] - excess, config.min_chunk_tokens or 1)
    if given and not room.grows and not (room.holds(sizes, config) and room.takes(sizes)):
        warnings.warn(_complaint(sizes, config, room), MemorySizeWarning, stacklevel=stacklevel + 1)
    if config.min_chunk_tokens is None:
        sizes["min_chunk_tokens"] = shortest_chunk(sizes["chunk_tokens"])
    changed: dict[str, Any] = dict(sizes)
    return evolve(config, **changed)


def chosen(asked: MPlusConfig, config: MPlusConfig) -> dict[str, int]:
    """Return the sizes of ``config`` that ``asked`` had left open, by name."""
    return {name: getattr(config, name) for name in names(config) if getattr(asked, name) is None}


def names(config: MPlusConfig) -> tuple[str, ...]:
    """Return the names of sizes that a config with this mechanism may leave open."""
    return (*MECHANISMS.get(config.mechanism.name).sizes, "min_chunk_tokens")


def _scale(given: dict[str, int], config: MPlusConfig, room: Room) -> int | None:
    """Return the largest scale, of ``PARTS``, at which everything fits; None where nothing does."""
    if not room.holds(_scaled(0, given, config), config):
        return None
    # What memory takes grows with the scale, so the largest one that fits is found by halving.
    fits, fails = 0, PARTS + 1
    while fails - fits > 1:
        middle = (fits + fails) // 2
        if room.holds(_scaled(middle, given, config), config):
            fits = middle
        else:
            fails = middle
    return fits


def _scaled(scale: int, given: dict[str, int], config: MPlusConfig) -> dict[str, int]:
    """Return the sizes that are given, and the published ones at ``scale``, of ``PARTS``, for the others."""
    sizes = {name: given.get(name, max(1, size * scale // PARTS)) for name, size in PUBLISHED.items()}
    if "short_term_tokens" not in given:
        sizes["short_term_tokens"] = max(sizes["short_term_tokens"], given.get("memory_tokens_per_chunk", 1))
    if "memory_tokens_per_chunk" not in given:  # a write must fit into the STM
        sizes["memory_tokens_per_chunk"] = min(sizes["memory_tokens_per_chunk"], sizes["short_term_tokens"])
    if "chunk_tokens" not in given:  # as published, a chunk has twice as many tokens as it leaves rows
        least = min(2 * sizes["memory_tokens_per_chunk"], PUBLISHED["chunk_tokens"])
        sizes["chunk_tokens"] = max(sizes["chunk_tokens"], least, config.min_chunk_tokens or 1)
    return sizes


def _complaint(sizes: dict[str, int], config: MPlusConfig, room: Room) -> str:
    retrieved, half = _retrieved(sizes, config), room.half or 0
    rows = 1 + retrieved + sizes["short_term_tokens"]
    if room.holds(sizes, config):
        return (
            f"a write of chunk_tokens ({sizes['chunk_tokens']:,}) behind 1 + memory_tokens_per_chunk "
            f"({sizes['memory_tokens_per_chunk']:,}) rows takes {room.written(sizes):,} positions, and "
            f"{room.decoder} knows {room.positions:,} positions: use smaller sizes, or leave them out"
        )
    ways = f"use smaller sizes (retrieved_tokens + short_term_tokens of at most {half - 1:,}, or leave them out)"
    if room.placed:
        span = max(half // 2, 1)
        ways += f", or compressed memory positions (memory_positions='compressed' and position_span={span}, say)"
    return (
        f"a read puts 1 + retrieved_tokens ({retrieved:,}) + short_term_tokens ({sizes['short_term_tokens']:,}) = "
        f"{rows:,} memory rows in front of the text and {room.decoder} knows {room.positions:,} positions, of which "
        f"memory should take at most half, {half:,}: {ways}"
    )
