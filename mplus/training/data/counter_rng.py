"""Random numbers without state: every draw is a function of what it is for, so that resuming needs only a position."""

from __future__ import annotations

from hashlib import blake2b
from typing import TypeAlias

ROUNDS = 8
"""Fewer leave some orders of a few places more likely than others."""


Key: TypeAlias = str | int | None
"""Part of the name of a purpose: a seed, a stream, a step, a word."""


class CounterRNG:
    """Draws for one purpose, named by ``key`` (seed, stream, step ...): the same key gives the same draws.

    Example:
        >>> from mplus.training.data.counter_rng import CounterRNG
        >>> CounterRNG(0, "lengths", 7).between(16, 512) == CounterRNG(0, "lengths", 7).between(16, 512)
        True
    """

    def __init__(self, *key: Key) -> None:
        self._key = key
        self._count = 0

    def below(self, limit: int) -> int:
        """Return a whole number in ``[0, limit)``."""
        self._count += 1
        # Of 128 bits, so that the remainder favours small numbers by nothing that could be measured.
        return _number(*self._key, self._count) % limit

    def between(self, least: int, most: int) -> int:
        """Return a whole number in ``[least, most]``."""
        return least + self.below(most - least + 1)

    def uniform(self) -> float:
        """Return a number in ``[0, 1)``."""
        # As many bits as a float has: each quotient is exact, and 1 is never reached.
        return self.below(1 << 53) / (1 << 53)


def permuted(place: int, count: int, *key: Key) -> int:
    """Return where ``place`` of ``range(count)`` comes in the order named by ``key``, without making all of it."""
    # Two halves of equally many bits, together just enough for ``count``: a walk takes fewer than four steps on
    # average.
    bits = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << bits) - 1
    while True:  # a Feistel network permutes 4 ** bits places; walking on until one is below count permutes these
        left, right = place >> bits, place & mask
        for round_ in range(ROUNDS):
            left, right = right, left ^ (_number(*key, round_, right) & mask)
        place = left << bits | right
        if place < count:
            return place


def _number(*key: Key) -> int:
    return int.from_bytes(blake2b(repr(key).encode(), digest_size=16).digest(), "little")
