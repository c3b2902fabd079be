"""The tile sizes that every kernel ships with: the launches read them, and so does the gate that compiles them."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import define

WIDEST = 256
"""Largest width of a head, or of a retriever's keys, that the kernels take."""

MOST_SEGMENTS = 4
"""Memory segments that one call of the attention kernel takes."""


@define(frozen=True)
class Tiles:
    """Sizes of the pieces that a kernel cuts its work into.

    Attributes:
        rows: query rows of a program: (token, head) pairs in attention, tokens in scoring, copied rows in the gather.
        keys: keys taken at a time; in scoring, those that a program keeps.
        warps: of 32 threads each.
        stages: loads of a loop that are under way at a time.
    """

    rows: int
    keys: int
    warps: int
    stages: int


def padded(width: int) -> int:
    """Return the power of two, at least 16, that a tile of ``width`` numbers takes."""
    return max(16, 1 << (width - 1).bit_length())


# Tiles shrink as heads and numbers widen, so that accumulator and operands stay in registers and shared memory. 16
# rows, the fewest a matrix unit takes, serve single tokens: there rows are the heads of a group, and keys are split.
ATTENTION: Mapping[tuple[int, int, str], Tiles] = {
    (16, 64, "few"): Tiles(16, 64, 4, 2),
    (16, 64, "many"): Tiles(64, 64, 4, 2),
    (16, 128, "few"): Tiles(16, 64, 4, 2),
    (16, 128, "many"): Tiles(64, 64, 4, 2),
    (16, 256, "few"): Tiles(16, 32, 4, 2),
    (16, 256, "many"): Tiles(64, 32, 8, 2),
    (32, 64, "few"): Tiles(16, 32, 4, 2),
    (32, 64, "many"): Tiles(32, 32, 4, 2),
    (32, 256, "few"): Tiles(16, 16, 8, 1),
    (32, 256, "many"): Tiles(16, 16, 8, 1),
}
"""(bits of a number, widest head, how many rows there are) -> tiles."""

SCORE: Mapping[tuple[int, int], Tiles] = {
    (16, 64): Tiles(64, 128, 4, 2),
    (16, 256): Tiles(64, 64, 4, 2),
    (32, 64): Tiles(32, 32, 4, 2),
    (32, 256): Tiles(32, 32, 8, 1),
}
"""(bits of a number, widest key) -> tiles."""

GATHER: Mapping[int, Tiles] = {64: Tiles(32, 1, 4, 1), 256: Tiles(16, 1, 4, 1)}
"""Widest head -> tiles; a program copies ``rows`` rows of one head."""


def attention_tiles(bits: int, width: int, rows: int) -> Tiles:
    """Return the tiles for heads of ``width`` (the wider of keys and values) and ``rows`` query rows per KV head."""
    wide = next(known for size, known, _ in ATTENTION if size == bits and known >= width)
    return ATTENTION[bits, wide, "few" if rows <= 16 else "many"]


def score_tiles(bits: int, width: int) -> Tiles:
    """Return the tiles for keys of ``width``."""
    return SCORE[bits, 64 if width <= 64 else 256]


def gather_tiles(width: int) -> Tiles:
    """Return the tiles for heads of ``width`` (the wider of keys and values)."""
    return GATHER[64 if width <= 64 else 256]


def splits_for(programs: int, blocks: int, processors: int) -> int:
    """Return how many parts to split the keys into, so that ``programs`` leave no processor without work.

    A split costs a pass over its partial output, so it gets at least two blocks of keys.
    """
    return max(1, min(processors // max(programs, 1), blocks // 2))
