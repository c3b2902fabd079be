"""Checksums of block files: against their definition in whole numbers, and what they are said to find."""

from __future__ import annotations

import random
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mplus.stores.disk.checksums import DIVIDED, LARGEST_ROW, PRESENT, WIDE, Crc32, WeightedSums, weights

WHOLE = 2**64


def splitmix(count: int) -> list[int]:
    """As published by Steele, Lea and Flood, state 0."""
    found, state = [], 0
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % WHOLE
        number = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) % WHOLE
        number = ((number ^ number >> 27) * 0x94D049BB133111EB) % WHOLE
        found.append(number ^ number >> 31)
    return found


def plain(block: bytes) -> list[int]:
    """The two sums of a block, word by word."""
    block += bytes(-len(block) % 8)
    constants = [number | 1 for number in splitmix(len(block) // 4)]
    words = [int.from_bytes(block[at : at + 8], "little") for at in range(0, len(block), 8)]
    between = [int.from_bytes(block[at : at + 8], "little") for at in range(4, len(block) - 8, 8)]
    return [
        sum(word * constants[2 * place + which] for place, word in enumerate(some)) % WHOLE
        for which, some in enumerate((words, between))
    ]


def of(block: bytes) -> list[int]:
    return WeightedSums(len(block)).of(torch.frombuffer(bytearray(block), dtype=torch.uint8))[0].tolist()


@given(st.integers(2, 90), st.integers(1, 3000), st.integers(0, 9), st.randoms(use_true_random=False))
def test_sums_are_what_they_are_defined_to_be(words, length, offset, draw):
    data = draw.randbytes(offset + length)
    found = WeightedSums(8 * words).of(torch.frombuffer(bytearray(data), dtype=torch.uint8)[offset:])
    blocks = [data[at : at + 8 * words].ljust(8 * words, b"\0") for at in range(offset, len(data), 8 * words)]
    assert [[number % WHOLE for number in sums] for sums in found.tolist()] == [plain(block) for block in blocks]
    assert found.element_size() * found.shape[1] == WeightedSums.size


@given(st.integers(0, 64), st.integers(1, 2**64 - 1), st.binary(min_size=24, max_size=24))
def test_every_change_within_64_neighbouring_bits_is_found(first, change, block):
    changed = int.from_bytes(block, "little") ^ (change << first)
    assert of(block) != of(changed.to_bytes(24, "little"))


def test_every_change_of_one_or_two_bits_is_found():
    """What a bit adds to the sums does not depend on the others: so all pairs are known from what single bits add."""
    length = LARGEST_ROW // 8
    straight, between = weights(length).T
    lower = (1 << 33) - 1
    for constants in (straight, between[:-1]):
        assert bool((constants % 2 == 1).all())
        assert len(torch.cat([constants & lower, -constants & lower]).unique()) == 2 * len(constants)
    # and for a small block, of all bits and pairs, by trying
    zeros = bytes(24)
    ones = [(1 << bit).to_bytes(24, "little") for bit in range(192)]
    blocks = [zeros, *ones] + [
        bytes(a | b for a, b in zip(ones[p], ones[q], strict=True)) for p in range(192) for q in range(p)
    ]
    sums = WeightedSums(24).of(torch.frombuffer(bytearray(b"".join(blocks)), dtype=torch.uint8))
    assert len(sums[1:].unique(dim=0)) == len(sums) - 1
    assert not bool((sums[1:] == sums[0]).all(1).any())


@pytest.mark.parametrize("length", [1, 99, 100, 301])
def test_crc32_is_that_of_zlib(length):
    data = random.Random(length).randbytes(length)
    found = Crc32(100).of(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    assert [n % 2**32 for n in found.flatten().tolist()] == [
        zlib.crc32(data[at : at + 100]) for at in range(0, length, 100)
    ]


@pytest.mark.parametrize("row_bytes", [0, 1, 8, 308, 511, 512, 514, 1002, 4096, LARGEST_ROW - 1, LARGEST_ROW, 2**20])
def test_wide_rows_have_a_checksum_each_as_far_as_they_have_whole_words(row_bytes):
    kind = PRESENT.of(row_bytes)
    assert kind.block_bytes % 8 == 0
    assert WIDE <= kind.block_bytes <= 2**20
    assert isinstance(kind, WeightedSums) == (row_bytes >= WIDE)
    if WIDE <= row_bytes <= LARGEST_ROW:
        rows = [count for count in range(1, 9) if count * row_bytes % 8 == 0]
        assert kind.block_bytes == rows[0] * row_bytes
    elif row_bytes > LARGEST_ROW:
        assert kind.block_bytes == DIVIDED


def test_other_bytes_have_other_sums():
    draw = random.Random(0)
    block = draw.randbytes(4096)
    assert of(block[8:] + block[:8]) != of(block)
    assert of(block[4:] + block[:4]) != of(block)
    assert of(bytes(4096)) != of(bytes(4095) + b"\1")
