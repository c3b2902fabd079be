"""Stores and other parts that several streams of a memory share, until one of them is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from mplus.stores.base import MemoryStore

S = TypeVar("S")
T = TypeVar("T")


def each(parts: Sequence[S], make: Callable[[S], T]) -> list[T]:
    """Call ``make(part)`` for every stream's part; streams that share one share what is made of it."""
    made: dict[int, T] = {}
    for part in parts:
        if id(part) not in made:
            made[id(part)] = make(part)
    return [made[id(part)] for part in parts]


def distinct(parts: Sequence[S]) -> list[S]:
    """Return each object once, in order."""
    return list({id(part): part for part in parts}.values())


def unshared(stores: tuple[MemoryStore, ...]) -> tuple[MemoryStore, ...]:
    """Return a store for each stream alone: the first keeps the one it shared, the others get forks."""
    seen: set[int] = set()
    own: list[MemoryStore] = []
    for store in stores:
        own.append(store.fork() if id(store) in seen else store)
        seen.add(id(store))
    return tuple(own)
