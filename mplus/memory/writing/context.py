"""What a mechanism may use and change while a stream takes in new rows."""

from __future__ import annotations

from collections.abc import Callable

from attrs import define
from torch import Tensor

from mplus.eviction.base import EvictionPolicy
from mplus.stores.access_log import AccessLog
from mplus.stores.base import MemoryStore

Draw = Callable[[int], Tensor]
"""``draw(n)``: a uniform random permutation of 0..n-1, int64 on the CPU."""

Keys = Callable[[int, Tensor], Tensor | None]
"""``keys(layer, hidden [m, d])``: retriever keys ``[m, r]``, or None."""


@define(frozen=True, eq=False)
class WriteContext:
    """What a mechanism may use and change while a stream takes in new rows.

    Attributes:
        store: the stream's long-term rows; the caller undoes changes if anything fails.
        eviction: chooses rows when the store is over its capacity.
        draw: source of random permutations.
        keys: makes retriever keys.
        ids: ``[n]`` int64, the text that the rows were made of.
        capacity: long-term rows that a layer may hold; None: no limit.
        usage: notes on what was retrieved, where ``eviction`` goes by them.
    """

    store: MemoryStore
    eviction: EvictionPolicy
    draw: Draw
    keys: Keys
    ids: Tensor | None = None
    capacity: int | None = None
    usage: AccessLog | None = None
