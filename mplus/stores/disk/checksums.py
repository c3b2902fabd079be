"""Checksums of blocks of bytes: how the tensors of a file are cut into blocks, and what is kept of each.

Wide rows, which are picked from all over a file, have a checksum each: ``WeightedSums``, two sums over a block, modulo
2 ** 64. One is of its 64-bit words (little-endian; a block is thought to be filled up with zeros), each times an odd
constant of its place; the other is of the 64-bit words that begin in the middle of those, times other constants. They
are sums so that the checksums of all rows that are gathered from a file are two products of a matrix and a vector,
several times faster than a CRC of each.

They know every change that is confined to 64 neighbouring bits: what it adds to the first sum is
``2 ** k * a * w + b * w'`` with ``w``, ``w'`` odd and ``abs(b) < 2 ** k``, so it is nothing only where ``b`` and then
``a`` are. They know every change of one or two bits in a block of up to 64 KiB: two different bits cancel in a sum only
where they stand in the same place of their words, and then one of the sums has them in the lower half of a word, where
they cancel only if the lower 33 bits of two constants agree up to their sign; none of the first 8,192 do. Of other
changes they miss one in about 2 ** 64.

Narrow rows, of which a few KiB hold hundreds, have the CRC-32 of every 64 KiB of them (2 to 4 GB/s by zlib): it knows
every change of up to 32 neighbouring bits, and misses others once in 2 ** 32 blocks.

Both guard against decay, not against forgers.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from functools import lru_cache
from math import gcd
from typing import ClassVar, Protocol

import torch
from attrs import define
from torch import Tensor

WIDE = 512
"""Bytes of a row that has a checksum of its own, which is 3 % of it."""
LARGEST_ROW = 2**16
"""Bytes up to which wide rows are not divided; so no block is larger than 1 MiB."""
DIVIDED = 4096
"""Bytes of the blocks of larger ones."""
NARROW_BLOCK = 2**16
WORD = 8


class Checksums(Protocol):
    """A kind of checksum of the blocks of a tensor.

    Attributes:
        size: bytes of one.
        dtype: its elements.
        block_bytes: bytes of a block; the last one of a tensor may be shorter.
    """

    size: ClassVar[int]
    dtype: ClassVar[torch.dtype]

    @property
    def block_bytes(self) -> int: ...

    def of(self, data: Tensor) -> Tensor:
        """Return ``[blocks, k]`` of ``dtype``: those of the blocks of ``data``, ``[nbytes]`` uint8, at least one."""


@define(frozen=True)
class Crc32:
    """The CRC-32, little-endian."""

    block_bytes: int
    size: ClassVar[int] = 4
    dtype: ClassVar[torch.dtype] = torch.int32

    def of(self, data: Tensor) -> Tensor:
        """Return the CRC of one block after the other."""
        view, step = memoryview(data.numpy()), self.block_bytes  # type: ignore[arg-type]
        sums = bytearray()
        for at in range(0, len(view), step):
            sums += zlib.crc32(view[at : at + step]).to_bytes(4, "little")
        return torch.frombuffer(sums, dtype=torch.int32).view(-1, 1)


@define(frozen=True)
class WeightedSums:
    """Two weighted sums of 64-bit words."""

    block_bytes: int
    size: ClassVar[int] = 2 * WORD
    dtype: ClassVar[torch.dtype] = torch.int64

    def of(self, data: Tensor) -> Tensor:
        """Return the sums of all blocks at a time."""
        size = self.block_bytes
        lacking = -data.shape[0] % size
        # A view as words has to begin at a multiple of 8 bytes of its storage; a copy does.
        if lacking or data.storage_offset() % WORD:
            data = torch.cat([data, torch.zeros(lacking, dtype=torch.uint8, device="cpu")])
        words = data.view(torch.int64).view(-1, size // WORD)
        count, length = words.shape
        straight, between = _constants(length)
        # The same memory from the middle of its first word on, which no view of ``words`` can show.
        middle = data[WORD // 2 :].numpy()
        shifted = torch.frombuffer(middle, dtype=torch.int64, count=count * length - 1)
        # One word fewer in a block: the last one from the middle on would reach into the next block.
        return torch.stack([words @ straight, shifted.as_strided((count, length - 1), (length, 1)) @ between], 1)


@define(frozen=True)
class Scheme:
    """Which checksums the tensors of a file have.

    Attributes:
        metadata: says so in its header.
        of: kind of checksums for a tensor whose rows take so many bytes.
    """

    metadata: Mapping[str, str]
    of: Callable[[int], Checksums]


def _by_width(row_bytes: int) -> Checksums:
    """Return ``WeightedSums`` of the least number of wide rows that has whole words; the CRC of narrow ones."""
    if row_bytes < WIDE:
        return Crc32(NARROW_BLOCK)
    return WeightedSums(DIVIDED if row_bytes > LARGEST_ROW else row_bytes * WORD // gcd(WORD, row_bytes))


FIRST = Scheme({"format": "mplus-blocks", "block_bytes": "8192", "checksum": "crc32"}, lambda row_bytes: Crc32(8192))
"""Of format version 1."""
PRESENT = Scheme({"format": "mplus-blocks", "checksum": "weighted-sums, crc32"}, _by_width)
"""Of format version 2."""


@lru_cache(maxsize=16)
def _constants(length: int) -> tuple[Tensor, Tensor]:
    """Return the constants of the words of a block, and of those that begin in the middle of them."""
    # Kept for all callers, also those outside of the inference mode in which the first may be.
    with torch.inference_mode(False):
        straight, between = weights(length).T.contiguous()
        return straight, between[:-1]


def weights(count: int) -> Tensor:
    """Return ``[count, 2]`` odd int64: the first numbers of SplitMix64 from 0, two for each word of a block."""
    # The constants of SplitMix64 (0x9E3779B97F4A7C15 and so on) as signed numbers: products of int64 wrap around alike.
    number = torch.arange(1, 2 * count + 1, device="cpu") * -0x61C8864680B583EB
    number = (number ^ _right(number, 30)) * -0x40A7B892E31B1A47
    number = (number ^ _right(number, 27)) * -0x6B2FB644ECCEEE15
    # Odd: such a factor can be undone modulo 2**64, so that a change of one word always changes the sum.
    return (number ^ _right(number, 31)).view(count, 2) | 1


def _right(number: Tensor, bits: int) -> Tensor:
    """Shift ``number`` to the right by ``bits``, as if it had no sign."""
    # ``>>`` fills up with the sign; the mask takes it off again.
    return (number >> bits) & ((1 << (64 - bits)) - 1)
