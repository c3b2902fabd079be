"""Slab: rows of one layer that lie together in a block; and how large blocks are made."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from attrs import define, evolve, field
from torch import Tensor

from mplus.stores.base import Chunk, ChunkCache, Location, ordinary_tensors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mplus.stores.slabs.block import Block

    _State = tuple[Block, int, int, int, Tensor | None, int, int, int]


@define(frozen=True, eq=False)
class Slab:
    """The places ``start .. end-1`` of a block, less those whose row was removed. The first and the last are live.

    Attributes:
        block: holds the rows, shared with other slabs.
        start, end: the part of the block that belongs to this slab.
        tip: where rows are appended to this slab: ``end``, unless the newest rows were removed.
        live: ``[end - start]`` bool, False where a row was removed; None: there are no such places.
        count: live rows, at least 1.
        first, last: ids at ``start`` and at ``end - 1``.
        cache: what readers found out about these rows and keep with them.
        inherited_cache: as in ``Chunk``.
    """

    block: Block
    start: int
    end: int
    tip: int
    live: Tensor | None
    count: int
    first: int
    last: int
    cache: ChunkCache = field(factory=ChunkCache, init=False, repr=False)
    inherited_cache: ChunkCache = field(factory=ChunkCache, init=False, repr=False)
    _chunks: dict[tuple[str, ...], Chunk] = field(factory=dict, init=False, repr=False)

    @staticmethod
    def of(block: Block, start: int, stop: int, live: Tensor | None = None) -> Slab | None:
        """Return a slab of the places ``start .. stop-1`` but for removed ends; None where no row is left."""
        count = stop - start if live is None else int(live.sum())
        return Slab._narrowed(block, start, stop, stop, live, count) if count else None

    @staticmethod
    def _narrowed(block: Block, start: int, end: int, tip: int, live: Tensor | None, count: int) -> Slab:
        """Return a slab without removed places at its ends."""
        if live is not None:
            low = 0 if bool(live[0]) else int(live.byte().argmax())  # the first
            high = end - start
            if not bool(live[-1]):
                high -= int(live.flip(0).byte().argmax())
            start, end, live = start + low, start + high, live[low:high]
            live = None if count == high - low else live
        ids = block.columns["id"]
        return Slab(block, start, end, tip, live, count, int(ids[start]), int(ids[end - 1]))

    def __len__(self) -> int:
        return self.end - self.start

    def __getstate__(self) -> _State:
        return self.block, self.start, self.end, self.tip, self.live, self.count, self.first, self.last

    def __setstate__(self, state: _State) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def column(self, name: str) -> Tensor:
        """Return ``[end - start, ...]``, a view; removed places hold anything."""
        return self.block.columns[name][self.start : self.end]

    def chunk(self, names: tuple[str, ...]) -> Chunk:
        """Return these columns as a chunk, the same one every time."""
        found = self._chunks.get(names)
        if found is None:
            columns = {name: self.column(name) for name in names}
            found = self._chunks[names] = Chunk(self.column("id"), self.live, columns, self.cache, self.inherited_cache)
        return found

    def live_places(self) -> Tensor | None:
        """Return the places of the live rows, counted from ``start``; None: all of them."""
        return None if self.live is None else self.live.nonzero().squeeze(1)

    def find(self, ids: Tensor) -> Tensor:
        """Return places ``[n]`` in the block of the rows with these ids. Raises KeyError naming a missing one."""
        # Ids without a gap: they are places already.
        if self.last - self.first == len(self) - 1:
            places = ids - self.first
            known = (places >= 0) & (places < len(self))
        else:
            present = self.column("id")
            places = torch.searchsorted(present, ids)
            known = present[places.clamp(max=len(self) - 1)] == ids
        if self.live is not None:
            known &= self.live[places.clamp(0, len(self) - 1)]
        if not bool(known.all()):
            raise KeyError(f"no row with id {int(ids[~known][0])}")
        return places + self.start

    def extended(self, added: int, last: int) -> Slab:
        """Return this slab with ``added`` places from the tip on, of which the last one has the id ``last``."""
        live, removed = self.live, self.tip - self.end
        # Places of removed rows at the end may be looked at by another slab of the block, so they are not used again.
        if live is not None or removed:
            with ordinary_tensors():
                live = self._mask() if live is None else live
                live = torch.cat([live, live.new_zeros(removed), live.new_ones(added)])
        end = self.tip + added
        return self.heir(evolve(self, end=end, tip=end, live=live, count=self.count + added, last=last))

    def without(self, places: Tensor) -> Slab | None:
        """Return this slab less the rows at ``places`` ``[n]`` of the block, live ones and none twice."""
        count = self.count - places.shape[0]
        if not count:
            return None
        with ordinary_tensors():
            live = (self._mask() if self.live is None else self.live).index_fill(0, places - self.start, False)
            return self.heir(Slab._narrowed(self.block, self.start, self.end, self.tip, live, count))

    def heir(self, slab: Slab) -> Slab:
        """Return ``slab``, made of this one by removing and appending, with what is known of both."""
        slab.inherited_cache.update(self.inherited_cache)
        return slab

    def _mask(self) -> Tensor:
        return torch.ones(len(self), dtype=torch.bool, device=self.block.columns["id"].device)


@define(frozen=True, eq=False)
class SlabLocation:
    """Where rows lie that were looked for.

    Attributes:
        parts: slabs, and the places ``[n_i]`` int64 in the block of each.
        order: as in ``Location``.
    """

    parts: Sequence[tuple[Slab, Tensor]]
    order: Tensor | None = None

    def located(self, name: str) -> Location:
        """Return one column of these rows."""
        return Location([(slab.block.columns[name], places) for slab, places in self.parts], self.order)

    def take(self, name: str) -> Tensor:
        """Return a copy of one column of these rows."""
        column, places = self.located(name).contiguous()
        # ``contiguous`` has made a copy already where rows come from several slabs.
        return column if len(self.parts) > 1 and self.order is None else column.index_select(0, places)

    def at(self, order: Tensor) -> SlabLocation:
        """Return those of these rows at ``order`` ``[n]``."""
        if len(self.parts) == 1 and self.order is None:
            ((slab, places),) = self.parts
            return SlabLocation([(slab, places.index_select(0, order))])
        return evolve(self, order=order if self.order is None else self.order[order])


@define(frozen=True)
class SlabSizes:
    """Sizes of blocks.

    Attributes:
        growth: factor by which a layer's room grows, above 1.
        most: rows of a block.
        expected: rows a layer is expected to hold; the first block has room for them, up to ``most``. 0: unknown.
        capacity: rows a layer holds at most when nothing is being written; it takes ``places_for`` them. None: any.
    """

    growth: float = 2.0
    most: int = 16384
    expected: int = 0
    capacity: int | None = None

    def for_capacity(self, capacity: int) -> SlabSizes:
        """Return sizes by which two half-empty blocks take no more than what ``places_for`` leaves free."""
        return evolve(self, most=min(self.most, (places_for(capacity) - capacity) // 2), capacity=capacity)

    @property
    def small(self) -> int:
        """Slabs below this size move into a larger block when they are full; others stay where they are."""
        return max(1, self.most // 4)

    @property
    def least(self) -> int:
        """Rows of a block, where there are other slabs of at least ``small`` rows."""
        return max(1, self.most // 16)

    def allowed(self, count: int) -> float:
        """Return the places in all blocks of ``count`` rows, above which room is given back."""
        return min(self.growth**2 * count + (self.least if count >= self.small else 0), self.reserved(count))

    def reserved(self, count: int) -> float:
        """Return the most places of ``count`` rows; more than ``capacity`` are there for a moment only."""
        return float("inf") if self.capacity is None else places_for(self.capacity) + max(0, count - self.capacity)


def places_for(rows: int) -> int:
    """Return the places that a layer of at most ``rows`` rows takes: an eighth, at least 2, are for blocks not full."""
    return rows + max(2, rows // 8)
