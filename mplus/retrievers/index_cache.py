"""IndexCache: one index for every layer of every store that is read, kept up to date with the rows."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from attrs import define, field
from torch import Tensor

from mplus.errors import NonFiniteError
from mplus.retrievers.candidates import keys_of, needed
from mplus.retrievers.ivf import POINTS_PER_CELL, IvfIndex, gpu_resources
from mplus.stores.base import Identity, StoreView
from mplus.stores.disk.locks import ProcessLock

logger = logging.getLogger(__name__)


@define(frozen=True, eq=False)
class SyncedIndex:
    """An index that can answer for a view.

    Attributes:
        index: up to date for that view, but for the rows below.
        removed: ``[x]`` int64, rows of the index that the view does not have.
        added: ``[y]`` int64, rows of the view that the index does not have.
    """

    index: IvfIndex
    removed: Tensor
    added: Tensor


@define(eq=False)
class _Slot:
    """One index, the state of the layer it was last brought up to, and the lock without which nobody touches it."""

    # A traceback may keep a block of `ready` open that an interrupt has left: its thread must still come in.
    lock: ProcessLock = field(factory=lambda: ProcessLock(threading.RLock))
    index: IvfIndex | None = None
    revision: int | None = None


class IndexCache:
    """Makes indexes when there are rows enough, follows the rows, and starts anew when these have outgrown it.

    An index lives as long as its store or any snapshot of it. Copies of a cache, pickled ones too, are empty.

    Args:
        least: rows from which on a layer has an index.
        cells: number of cells; None: by the number of rows.
        outgrown: an index is made anew when this many times as many rows were added as it was trained on.
        gpu: search copies on the first GPU.

    Raises:
        NotSupported: there is no GPU for faiss.
    """

    def __init__(self, least: int, cells: int | None, outgrown: float, gpu: bool = False) -> None:
        self.least = least
        self.cells = cells
        self.outgrown = outgrown
        self.gpu = gpu
        self._resources = gpu_resources() if gpu else None
        self._slots: WeakKeyDictionary[Identity, dict[int, _Slot]] = WeakKeyDictionary()
        self._lock = ProcessLock()

    def __reduce__(self) -> tuple[type[IndexCache], tuple[int, int | None, float, bool]]:
        return IndexCache, (self.least, self.cells, self.outgrown, self.gpu)

    @contextmanager
    def synced(self, store: StoreView, layer: int) -> Iterator[SyncedIndex | None]:
        """Yield the index for a view, to be used inside only; None where rows are few or their ids do not last.

        An index follows the newest view it is asked for. For an older one, such as a snapshot that a generation reads
        while more is written, it stays as it is, and what the two do not have in common is named.
        """
        slot = self._slot(store, layer)
        if slot is None:
            yield None
            return
        with slot.lock.here():
            yield self._brought_up(slot, store, layer)

    def sync(self, store: StoreView) -> None:
        """Bring the indexes that a store has up to its present rows."""
        with self._lock.here():
            layers = list(self._slots.get(store.identity, ())) if store.identity is not None else []
        for layer in layers:
            with self.synced(store, layer):
                pass

    def tensors(self, store: StoreView, layer: int) -> dict[str, Tensor]:
        """Return tensors that an index of exactly the rows of ``store`` can be built from; empty where there is none.

        See ``IvfIndex.tensors``; ``cell`` is in the order of the rows.
        """
        slot = self._slot(store, layer)
        if slot is None or slot.index is None:
            return {}  # saving rows is no reason to train one
        with self.synced(store, layer) as ready:
            if ready is None or len(ready.removed) or len(ready.added):
                return {}
            return ready.index.tensors()

    def load(self, store: StoreView, layer: int, tensors: dict[str, Tensor]) -> None:
        """Build the index of ``store`` from ``tensors`` of an equal one instead of training it.

        Raises:
            InputError: they are not of an index over these rows; the store is left without one.
        """
        slot = self._slot(store, layer)
        if slot is None:
            return
        with slot.lock.here():
            slot.index, slot.revision = None, None
            index = IvfIndex.of(tensors, store.count(layer), _chunks(store, layer))
            index.resources = self._resources
            slot.index, slot.revision = index, store.revision(layer)

    def _slot(self, store: StoreView, layer: int) -> _Slot | None:
        if store.identity is None:
            return None
        with self._lock.here():
            slots = self._slots.setdefault(store.identity, {})
            if store.count(layer) >= self.least:
                return slots.setdefault(layer, _Slot())
            slot, revision = slots.get(layer), store.revision(layer)
            if slot is not None and (revision is None or slot.revision is None or revision > slot.revision):
                del slots[layer]  # rows that were removed are not to be kept here
            return None

    def _brought_up(self, slot: _Slot, store: StoreView, layer: int) -> SyncedIndex | None:
        none, revision = torch.empty(0, dtype=torch.int64), store.revision(layer)
        index = slot.index
        if index is not None and revision is not None and revision == slot.revision:
            return SyncedIndex(index, none, none)
        ids = store.ids(layer).cpu()
        gone, new = (none, ids) if index is None else differences(index.ids, ids)
        if index is not None and self._is_older(slot, revision, index, ids):
            return SyncedIndex(index, gone, new)
        slot.index, slot.revision = None, None  # whatever ends a change early leaves no index that is half changed
        try:
            if index is None or self._is_outgrown(index, len(new)):
                index = self._trained(store, layer, ids)
            else:
                index.remove(gone)
                if len(new):
                    index.add(new, keys_of(store, layer, new))
        except NonFiniteError as error:
            logger.info("layer %d is searched exactly: %s", layer, error)
            return None
        slot.index, slot.revision = index, revision
        return SyncedIndex(index, none, none)

    @staticmethod
    def _is_older(slot: _Slot, revision: int | None, index: IvfIndex, ids: Tensor) -> bool:
        """Return whether a view is older than the index; judged by the newest row where changes are not counted."""
        if revision is not None and slot.revision is not None:
            return revision < slot.revision
        return len(index) > 0 and int(ids[-1]) < int(index.ids[-1])

    def _is_outgrown(self, index: IvfIndex, new: int) -> bool:
        """Return whether far more rows have come than it was trained on, those that left again included."""
        return index.added - index.trained_on + new > self.outgrown * index.trained_on

    def _trained(self, store: StoreView, layer: int, ids: Tensor) -> IvfIndex:
        cells = self.cells or max(1, round(2 * math.sqrt(len(ids))))
        count = min(len(ids), cells * POINTS_PER_CELL)
        spread = ids[torch.arange(count) * len(ids) // count]  # evenly over all rows, old and new
        index = IvfIndex.train(keys_of(store, layer, spread), cells, len(ids))
        logger.info("layer %d: an index of %d cells was trained on %d rows", layer, index.cells, len(ids))
        index.resources = self._resources
        for part, keys in _chunks(store, layer):
            index.add(part, keys)
        return index


def differences(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Return ids of ``old`` that are not in ``new``, and the reverse; both ascending."""
    if len(old) and len(new):
        # As a rule the oldest left and new ones came: then nothing has to be looked for.
        first = int(torch.searchsorted(old, new[0]))
        common = len(old) - first
        if common <= len(new) and torch.equal(old[first:], new[:common]):
            return old[:first], new[common:]
    return _without(old, new), _without(new, old)


def _without(some: Tensor, others: Tensor) -> Tensor:
    """Return ``some`` without ``others``, both ascending."""
    if not len(others):
        return some
    places = torch.searchsorted(others, some).clamp(max=len(others) - 1)
    return some[others[places] != some]


def _chunks(store: StoreView, layer: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ids and keys of all rows, a chunk at a time."""
    for chunk in store.chunks(layer, "key"):
        keys = needed(chunk.columns.get("key"), layer)
        yield (chunk.ids, keys) if chunk.live is None else (chunk.ids[chunk.live], keys[chunk.live])
