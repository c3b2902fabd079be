"""GroupSearch: which groups of a stream have the largest inner products with a query."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from attrs import define, field
from torch import Tensor

from mplus.errors import MissingDependencyError
from mplus.stores.base import Identity, StoreView
from mplus.stores.disk.locks import ProcessLock
from mplus_memlong.state import MemLongState

if TYPE_CHECKING:
    from mplus.retrievers.ivf import IvfIndex

LEAST_PROBES = 32
"""Cells of an index that a search looks into at least."""
SPARE = 4
"""How many times as many groups as are wanted an index is asked for, which are then scored exactly."""
OUTGROWN = 3.0
"""An index is made anew when so many times as many groups were added as it was trained on."""


@define(eq=False)
class GroupSearch:
    """Scores all groups, or, in a large bank, those that an inverted file of faiss finds.

    An index follows the newest state of its stream; older ones, which a generation may still read, are searched
    exactly.

    Attributes:
        exact: groups up to which all are scored.
    """

    exact: int
    _indexes: WeakKeyDictionary[Identity, IvfIndex] = field(factory=WeakKeyDictionary, init=False)
    _lock: ProcessLock = field(factory=ProcessLock, init=False)

    def __reduce__(self) -> tuple[type[GroupSearch], tuple[int]]:
        return GroupSearch, (self.exact,)  # copies make indexes of their own

    def best(self, query: Tensor, state: MemLongState, store: StoreView, count: int) -> tuple[Tensor, Tensor]:
        """Return the ``count`` best groups, or all, oldest first, as in the released code.

        Args:
            query: ``[v]``.
            state: of the stream.
            store: of the stream, by whose identity its index is known.
            count: at least 1.

        Returns:
            Places in the table of groups ``[k]`` int64, ascending, and scores ``[k]`` float32.

        Raises:
            MissingDependencyError: the bank is large, and faiss is not installed.
        """
        some = self._candidates(query, state, store, count)
        scores = (state.group_key if some is None else state.group_key[some]) @ query
        best = scores.argsort(descending=True, stable=True)[:count].sort().values
        return (best if some is None else some[best]), scores[best]

    def drop(self, store: StoreView) -> None:
        """Let go of the index of a stream, some of whose groups are to be forgotten."""
        with self._lock.here():
            if store.identity is not None:
                self._indexes.pop(store.identity, None)

    def _candidates(self, query: Tensor, state: MemLongState, store: StoreView, count: int) -> Tensor | None:
        """Return places ``[m]`` ascending to be scored; None: all."""
        if state.groups <= self.exact or store.identity is None:
            return None
        with self._lock.here():
            index = _brought_up(self._indexes.get(store.identity), state)
            if index is None:
                return None
            self._indexes[store.identity] = index
            wanted = SPARE * count
            times = index.search(query, wanted, max(LEAST_PROBES, round(4 * wanted * index.cells / len(index))))
        return torch.searchsorted(state.group_time, times.sort().values)


def _brought_up(index: IvfIndex | None, state: MemLongState) -> IvfIndex | None:
    """Return an index of exactly the groups of ``state``, by their times; None: it is older than the one there is."""
    from mplus.retrievers.index_cache import differences

    times, keys = state.group_time, state.group_key
    if index is None:
        return _trained(times, keys)
    gone, new = differences(index.ids, times)
    if len(index) and int(times[-1]) < int(index.ids[-1]):
        return None
    outgrown = index.added - index.trained_on + len(new) > OUTGROWN * index.trained_on
    if outgrown or (len(new) and int(new[0]) < int(index.ids[-1])):  # or groups came back that had left
        return _trained(times, keys)
    index.remove(gone)
    if len(new):
        index.add(new, keys[torch.searchsorted(times, new)])
    return index


def _trained(times: Tensor, keys: Tensor) -> IvfIndex:
    try:
        from mplus.retrievers.ivf import POINTS_PER_CELL, IvfIndex
    except ImportError as error:
        raise MissingDependencyError(
            f"a bank of {len(times):,} groups is searched with the package 'faiss', which is not installed: "
            "pip install 'mplus-memlong[faiss]', or set exact_groups so high that all groups are scored",
            name="faiss",
        ) from error
    cells = max(1, round(2 * math.sqrt(len(times))))
    count = min(len(times), cells * POINTS_PER_CELL)
    index = IvfIndex.train(keys[torch.arange(count) * len(times) // count], cells, len(times))
    index.add(times, keys)
    return index
