"""SlabLayer: the rows of one layer as an immutable value, in slabs that many values share."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from attrs import define, evolve
from torch import Tensor

from mplus.rows import MemoryRows
from mplus.stores.base import ordinary_tensors
from mplus.stores.slabs.slab import Slab, SlabLocation

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from mplus.stores.base import Chunk, Location, StoreLayout
    from mplus.stores.slabs.block import Allocator, Block
    from mplus.stores.slabs.slab import SlabSizes


_FIELDS = ("layout", "sizes", "allocator", "slabs", "next_id", "revision")


@define(frozen=True, eq=False, slots=False)
class SlabLayer:
    """Rows of one layer. Changing it makes a new value that shares all slabs but those that were touched.

    Appending writes behind the rows of the last slab where that place is free, and into a new block otherwise.
    Removing makes new masks for the slabs it touches. A slab is rewritten when most of it is removed rows, and the
    emptiest ones when blocks hold more than ``growth ** 2`` times the rows; so room and copying stay in proportion.

    Attributes:
        layout: what the rows look like.
        sizes: of blocks.
        allocator: gives them.
        slabs: in ascending order of ids.
        next_id: id of the next row appended; ids are never given twice.
        revision: changes that led here.
    """

    layout: StoreLayout
    sizes: SlabSizes
    allocator: Allocator
    slabs: tuple[Slab, ...] = ()
    next_id: int = 0
    revision: int = 0

    def __len__(self) -> int:
        return self._count

    @cached_property
    def _count(self) -> int:
        return sum(slab.count for slab in self.slabs)

    @property
    def capacity(self) -> int:
        """Places in all blocks."""
        return sum(slab.block.capacity for slab in self.slabs)

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks, and of what the allocator keeps."""
        return sum(slab.block.nbytes for slab in self.slabs) + self.allocator.spare_bytes

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _FIELDS}

    # ------------------------------------------------------------------ reading

    @cached_property
    def _columns(self) -> dict[str, Tensor]:
        return {}

    def column(self, name: str) -> Tensor | None:
        """Return ``[m, ...]``: one column of all rows, ``id`` included; None where the layout has no such column.

        A view where the rows lie together; copied once otherwise.
        """
        if name != "id" and name not in self.layout.columns():
            return None
        if name not in self._columns:
            with ordinary_tensors():
                self._columns[name] = self._joined(name)
        return self._columns[name]

    def _joined(self, name: str) -> Tensor:
        if not self.slabs:
            shape, dtype = ((), torch.int64) if name == "id" else self.layout.columns()[name]
            return torch.empty(0, *shape, dtype=dtype, device=self.layout.device)
        parts = []
        for slab in self.slabs:
            places, whole = slab.live_places(), slab.column(name)
            parts.append(whole if places is None else whole.index_select(0, places))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def content(self, name: str) -> Tensor | None:
        """Return a column as ``column`` does, where that is a view; None elsewhere."""
        together = not self.slabs or (len(self.slabs) == 1 and self.slabs[0].live is None)
        return self.column(name) if together else None

    @property
    def ids(self) -> Tensor:
        """``[m]`` int64, ascending."""
        return cast("Tensor", self.column("id"))

    def chunks(self, names: Iterable[str]) -> list[Chunk]:
        """Return a chunk for every slab."""
        wanted = tuple(name for name in names if name in self.layout.columns())
        return [slab.chunk(wanted) for slab in self.slabs]

    def find(self, ids: Tensor) -> SlabLocation:
        """Return where the rows with these ids lie. Raises KeyError naming one that is not there."""
        ids = ids.to(self.layout.device)
        if not ids.shape[0]:
            return SlabLocation([])
        if len(self.slabs) == 1:
            return SlabLocation([(self.slabs[0], self.slabs[0].find(ids))])
        # Slabs ascend in ids, so the first slab whose last id is not below one is the only one that can have it.
        which, order = torch.searchsorted(self._lasts, ids), None
        # The ids of one slab have to lie side by side, so that each slab is asked once.
        if not bool((which[1:] >= which[:-1]).all()):
            by_slab = which.argsort(stable=True)
            ids, order = ids[by_slab], by_slab.argsort()
        parts, start = [], 0
        *counts, beyond = which.bincount(minlength=len(self.slabs) + 1).tolist()
        if beyond:
            raise KeyError(f"no row with id {int(ids[-1])}")
        for slab, count in zip(self.slabs, counts, strict=True):
            if count:
                parts.append((slab, slab.find(ids[start : start + count])))
                start += count
        return SlabLocation(parts, order)

    @cached_property
    def _lasts(self) -> Tensor:
        with ordinary_tensors():
            return torch.tensor([slab.last for slab in self.slabs], dtype=torch.int64, device=self.layout.device)

    def gather(self, ids: Tensor, leave_out: Collection[str] = ()) -> MemoryRows:
        """Return copies of the rows with these ids. Raises KeyError naming one that is not there."""
        found, columns = self.find(ids), {}
        for name, (shape, dtype) in self.layout.columns().items():
            if name not in leave_out and found.parts:
                columns[name] = found.take(name)
            elif name not in leave_out:
                columns[name] = torch.empty(0, *shape, dtype=dtype, device=self.layout.device)
        return MemoryRows.of(columns)

    def locate(self, name: str, ids: Tensor) -> Location:
        """Return where the rows with these ids lie. Raises KeyError as ``gather``."""
        return self.find(ids).located(name)

    # ------------------------------------------------------------------ changing

    def append(self, rows: MemoryRows) -> SlabLayer:
        """Return this layer and copies of ``rows`` behind it. Raises InputError where their columns are others."""
        self.layout.check(rows)
        slabs, columns, done, next_id = list(self.slabs), rows.columns(), 0, self.next_id
        count = len(self) + len(rows)
        while done < len(rows):
            left, tail = len(rows) - done, slabs[-1] if slabs else None
            free = self.sizes.reserved(count) - sum(slab.block.capacity for slab in slabs)
            # A fork shares the block: whoever claims the place behind the last row first may write there.
            granted = tail.block.claim(tail.tip, left) if tail is not None and tail.block.home is self.allocator else 0
            if tail is not None and granted:
                _write(tail.block, tail.tip, columns, done, granted, next_id)
                slabs[-1] = tail.extended(granted, next_id + granted - 1)
            elif tail is not None and tail.count < self.sizes.small:
                least = tail.count + left
                room = max(min(int(self.sizes.growth * tail.count), free + tail.block.capacity), least)
                slabs[-1] = _moved([tail], int(min(room, self.sizes.most)), self.allocator)
                continue  # into the place that there is now behind it
            else:
                # What the sizes leave free, and no less than what is to be written takes.
                room = max(min(self._room(tail, left), free), min(left, self.sizes.most))
                block = self.allocator.allocate(int(room))
                granted = block.claim(0, left)
                _write(block, 0, columns, done, granted, next_id)
                slabs.append(Slab(block, 0, granted, granted, None, granted, next_id, next_id + granted - 1))
            done, next_id = done + granted, next_id + granted
        if self.sizes.capacity is not None:  # a budget also limits the room between rows
            slabs = self._compacted(slabs, ())
        return evolve(self, slabs=tuple(slabs), next_id=next_id, revision=self.revision + 1)

    def compacted(self) -> SlabLayer:
        """Return the same rows in no more room than ``sizes`` allow."""
        return evolve(self, slabs=tuple(self._compacted(list(self.slabs), ())))

    def remove(self, ids: Tensor) -> SlabLayer:
        """Return this layer less the rows with these ids. Raises KeyError naming one that is not there."""
        # unique sorts, too, so that the ids of a slab lie together.
        gone = {id(slab): places for slab, places in self.find(ids.unique()).parts}
        if not gone:
            return self
        slabs = []
        for slab in self.slabs:
            left = slab.without(gone[id(slab)]) if id(slab) in gone else slab
            if left is not None:
                slabs.append(left)
        before = {id(slab) for slab in self.slabs}
        touched = [place for place, slab in enumerate(slabs) if id(slab) not in before]
        return evolve(self, slabs=tuple(self._compacted(slabs, touched)), revision=self.revision + 1)

    def to(self, layout: StoreLayout, allocator: Allocator) -> SlabLayer:
        """Return the same rows and ids in the dtype and on the device of ``layout``, in blocks of their own."""
        slabs = tuple(_moved([slab], slab.count, allocator) for slab in self.slabs)
        return evolve(self, layout=layout, allocator=allocator, slabs=slabs)

    def _room(self, tail: Slab | None, left: int) -> int:
        """Return the rows of a new block, before ``left`` rows are appended."""
        sizes = self.sizes
        room = sizes.expected
        if tail is not None:
            room = sizes.least
            if tail.tip == tail.block.capacity:  # the layer's own room is used up; a fork took the place otherwise
                room = max(room, int((sizes.growth - 1) * len(self)))
            room = 1 << (room.bit_length() - 1)  # few different sizes, so that blocks can be used again
        return min(max(room, left), sizes.most)

    def _compacted(self, slabs: list[Slab], touched: Sequence[int]) -> list[Slab]:
        """Rewrite slabs with few rows among their places, small neighbours with them."""
        # From behind: a rewrite may join neighbours, and those in front keep their places.
        for place in reversed(touched):
            if len(slabs[place]) > self.sizes.growth**2 * slabs[place].count:
                self._rewrite(slabs, place)
        count = sum(slab.count for slab in slabs)
        while sum(slab.block.capacity for slab in slabs) > self.sizes.allowed(count):
            wasted = [slab.block.capacity - self._fitting(slab.count, slab is slabs[-1]) for slab in slabs]
            worst = max(range(len(slabs)), key=wasted.__getitem__)
            if wasted[worst] <= 0:  # what is left over is rounding: no rewrite would give room back
                break
            self._rewrite(slabs, worst)
        return slabs

    def _rewrite(self, slabs: list[Slab], place: int) -> None:
        """Rewrite a slab, and small neighbours with it, in place in the list."""
        low = place - 1 if place and self._joins(slabs[place], slabs[place - 1]) else place
        high = place + 1
        joined = sum(slab.count for slab in slabs[low:high])
        if high < len(slabs) and self._joins(slabs[place], slabs[high]):
            # A comparison counts as 0 or 1: one neighbour more, if both fit.
            high += joined + slabs[high].count <= self.sizes.most // 2
        slabs[low:high] = [self._rewritten(slabs[low:high], high == len(slabs))]

    def _joins(self, slab: Slab, neighbour: Slab) -> bool:
        """Return True if the neighbour of a slab that is rewritten moves with it: at most as much again is copied."""
        size = neighbour.count
        return size <= max(slab.count, self.sizes.least) and size + slab.count <= self.sizes.most // 2

    def _rewritten(self, slabs: Sequence[Slab], last: bool) -> Slab:
        return _moved(slabs, self._fitting(sum(slab.count for slab in slabs), last), self.allocator)

    def _fitting(self, count: int, last: bool) -> int:
        """Return the rows of a block for ``count`` rows; more are to come only behind the last ones."""
        return max(count, min(int(self.sizes.growth * count), self.sizes.most)) if last else count


def _write(block: Block, start: int, columns: Mapping[str, Tensor], done: int, granted: int, next_id: int) -> None:
    """Write rows ``done .. done+granted-1`` of ``columns`` to places of ``block``, with ids from ``next_id`` on."""
    ids = torch.arange(next_id, next_id + granted, device=block.columns["id"].device)
    block.write(start, {"id": ids, **{name: column[done : done + granted] for name, column in columns.items()}})


def _moved(slabs: Sequence[Slab], capacity: int, allocator: Allocator) -> Slab:
    """Copy the rows of these slabs to the beginning of a block of their own."""
    count = sum(slab.count for slab in slabs)
    block = allocator.allocate(max(capacity, count))
    block.claim(0, count)
    start = 0
    for slab in slabs:
        block.write(start, {name: slab.column(name) for name in block.columns}, slab.live_places())
        start += slab.count
    ids = block.columns["id"]
    moved = Slab(block, 0, count, count, None, count, int(ids[0]), int(ids[count - 1]))
    return slabs[0].heir(moved) if len(slabs) == 1 else moved
