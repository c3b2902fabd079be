"""The columns of a layer that every read looks at in full, in the fastest tier that has room for them."""

from __future__ import annotations

import weakref
from threading import RLock
from typing import TYPE_CHECKING

import torch
from attrs import evolve

from mplus.rows import MemoryRows
from mplus.stores.base import ordinary_tensors
from mplus.stores.disk.locks import ProcessLock
from mplus.stores.slabs.block import Allocator, Block, block_columns
from mplus.stores.slabs.layer import SlabLayer
from mplus.stores.slabs.slab import Slab, SlabSizes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from mplus.stores.base import Chunk, StoreLayout, StoreView

SIZES = SlabSizes(growth=1.25)


class BudgetExceeded(Exception):
    """A block would not fit into the budget."""


class BudgetedAllocator(Allocator):
    """Blocks on one device that together never take more than a budget."""

    def __init__(self, layout: StoreLayout, budget: int, *, pinned: bool = False) -> None:
        """``layout``: of the columns. ``pinned``: in page-locked memory."""
        self.layout, self.budget, self.nbytes = layout, budget, 0
        self._pinned = pinned
        self._row_bytes = layout.row_bytes + 8
        # The garbage collector may give a block back in the middle of ``allocate``, in the same thread.
        self._lock = ProcessLock(RLock)

    def has_room(self, rows: int) -> bool:
        """Return True if a block of so many rows would fit now."""
        return self.nbytes + rows * self._row_bytes <= self.budget

    def allocate(self, rows: int) -> Block:
        """Return a block as ``Allocator.allocate`` does. Raises BudgetExceeded."""
        size = rows * self._row_bytes
        with self._lock.here():
            # Booked before it is made: another thread that asks meanwhile is told that this room is taken.
            if self.nbytes + size > self.budget:
                raise BudgetExceeded
            self.nbytes += size
        try:
            with ordinary_tensors():
                columns = {
                    name: torch.empty(rows, *shape, dtype=dtype, device=self.layout.device, pin_memory=self._pinned)
                    for name, (shape, dtype) in block_columns(self.layout).items()
                }
            block = Block(columns, home=self)
            weakref.finalize(block, self._back, size).atexit = False
        except BaseException:
            self._back(size)
            raise
        return block

    def _back(self, size: int) -> None:
        with self._lock.here():
            self.nbytes -= size


class ResidentColumns:
    """The small columns of the rows that one layer has at one moment; shared by all who see these rows.

    They are copied by the first read. From then on they follow every change, rows that are appended bring them.
    """

    def __init__(
        self, allocators: Sequence[BudgetedAllocator], layer: SlabLayer | None = None, *, known: bool = False
    ) -> None:
        """``layer``: the columns, where they are known already; None: they fit nowhere."""
        self._allocators = allocators
        self._layer = layer
        self._known = known
        self._lock = ProcessLock()

    @property
    def allocator(self) -> BudgetedAllocator | None:
        """The tier they are in; None: in none, or not looked at yet."""
        found = None if self._layer is None else self._layer.allocator
        return found if isinstance(found, BudgetedAllocator) else None

    def of(self, view: StoreView, layer: int) -> SlabLayer | None:
        """Return the columns of the rows of ``layer``, which ``view`` has; None: no tier has room for them."""
        with self._lock.here():
            if not self._known:
                self._layer = self._copied(view, layer, self._allocators)
                self._known = True
            return self._layer

    def appended(self, ids: Tensor, rows: MemoryRows) -> ResidentColumns:
        """Return these columns with ``rows``, at least one, under ``ids`` behind them."""
        names = self._allocators[0].layout.columns()
        own = MemoryRows.of({name: column for name, column in rows.columns().items() if name in names})
        return self._changed(lambda layer: evolve(layer, next_id=int(ids[0])).append(own))

    def removed(self, ids: Tensor) -> ResidentColumns:
        """Return these columns without the rows with ``ids``, which are there."""
        return self._changed(lambda layer: layer.remove(ids))

    def _changed(self, change: Callable[[SlabLayer], SlabLayer]) -> ResidentColumns:
        if not self._known:
            return ResidentColumns(self._allocators)
        if self._layer is None:
            # No tier had room; after some more or fewer rows it is looked at again by a read.
            return ResidentColumns(self._allocators)
        try:
            return ResidentColumns(self._allocators, change(self._layer), known=True)
        except BudgetExceeded:
            return ResidentColumns(self._allocators)

    def _copied(self, view: StoreView, layer: int, allocators: Sequence[BudgetedAllocator]) -> SlabLayer | None:
        for allocator in allocators:
            if not allocator.has_room(
                int(view.count(layer) * SIZES.growth**2)
            ):  # or the next change would find it full
                continue
            try:
                return _copy(view.chunks(layer, *allocator.layout.columns()), allocator)  # type: ignore[arg-type]
            except BudgetExceeded:
                continue
        return None


def _copy(chunks: Sequence[Chunk], allocator: BudgetedAllocator) -> SlabLayer:
    slabs: list[Slab] = []
    for chunk in chunks:
        places = torch.arange(len(chunk.ids)) if chunk.live is None else chunk.live.nonzero().squeeze(1)
        for part in places.split(SIZES.most):
            if len(part):
                block = allocator.allocate(len(part))
                block.claim(0, len(part))
                index = None if chunk.live is None and len(part) == len(chunk.ids) else part
                block.write(0, {"id": chunk.ids, **chunk.columns}, index)
                slab = Slab.of(block, 0, len(part))
                slabs += [] if slab is None else [slab]
    next_id = slabs[-1].last + 1 if slabs else 0
    return SlabLayer(allocator.layout, SIZES, allocator, tuple(slabs), next_id)
