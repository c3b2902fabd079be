"""Slab: rows of one layer that lie together in a block; and how large blocks are made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from attrs import define, evolve, field
from torch import Tensor

from mplus.stores.blocks import ordinary_tensors

if TYPE_CHECKING:
    from mplus.stores.blocks import Block


@define(frozen=True, eq=False)
class Slab:
    """The places ``start .. stop-1`` of a block, less those whose row was removed. The first place is live.

    Attributes:
        block: holds the rows, shared with other slabs.
        start, stop: the part of the block that belongs to this slab.
        live: ``[stop - start]`` bool, False where a row was removed; None: there are no such places.
        count: live rows, at least 1.
        first, last: ids at ``start`` and at ``stop - 1``.
        known: what readers found out about these rows and keep with them.
    """

    block: Block
    start: int
    stop: int
    live: Tensor | None
    count: int
    first: int
    last: int
    known: dict[str, Any] = field(factory=dict, init=False, repr=False)

    @staticmethod
    def of(block: Block, start: int, stop: int, live: Tensor | None = None) -> Slab | None:
        """A slab of these places, without the removed ones at the beginning; None where no row is left."""
        if live is not None:
            count = int(live.sum())
            if not count:
                return None
            skipped = int(live.byte().argmax())  # the first
            start, live = start + skipped, live[skipped:]
            live = None if count == stop - start else live
        elif start == stop:
            return None
        else:
            count = stop - start
        ids = block.columns["id"]
        return Slab(block, start, stop, live, count, int(ids[start]), int(ids[stop - 1]))

    def __len__(self) -> int:
        return self.stop - self.start

    def __getstate__(self) -> tuple[Any, ...]:
        return self.block, self.start, self.stop, self.live, self.count, self.first, self.last

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def column(self, name: str) -> Tensor:
        """``[stop - start, ...]``, a view; removed places hold anything."""
        return self.block.columns[name][self.start : self.stop]

    def live_places(self) -> Tensor | None:
        """Places of the live rows, counted from ``start``; None: all of them."""
        return None if self.live is None else self.live.nonzero().squeeze(1)

    def find(self, ids: Tensor) -> Tensor:
        """Places ``[n]`` in the block of the rows with these ids. Raises KeyError naming one that is not there."""
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
        """With the ``added`` places behind, of which the last one has the id ``last``."""
        live = self.live
        if live is not None:
            with ordinary_tensors():
                live = torch.cat([live, live.new_ones(added)])
        return evolve(self, stop=self.stop + added, live=live, count=self.count + added, last=last)

    def without(self, places: Tensor) -> Slab | None:
        """This slab less the rows at ``places`` ``[n]`` of the block."""
        with ordinary_tensors():
            live = torch.ones(len(self), dtype=torch.bool, device=places.device) if self.live is None else self.live
            return Slab.of(self.block, self.start, self.stop, live.index_fill(0, places - self.start, False))


@define(frozen=True, eq=False)
class Found:
    """Some of the rows that were looked for, all in one slab.

    Attributes:
        slab: holds them.
        places: ``[n]`` int64, of the block.
        into: where they stand in the order that was asked for; None: there are no others.
    """

    slab: Slab
    places: Tensor
    into: slice | Tensor | None = None


@define(frozen=True)
class SlabSizes:
    """How large blocks are made.

    Attributes:
        growth: factor by which a layer's room grows, above 1.
        most: rows of a block.
        expected: rows a layer is expected to hold; the first block has room for them, up to ``most``. 0: unknown.
    """

    growth: float = 2.0
    most: int = 16384
    expected: int = 0

    @property
    def small(self) -> int:
        """Slabs below this size move into a larger block when they are full; others stay where they are."""
        return max(1, self.most // 4)

    @property
    def least(self) -> int:
        """Rows of a block, where there are other slabs of at least ``small`` rows."""
        return max(1, self.most // 16)

    def allowed(self, count: int) -> float:
        """Places in all blocks of ``count`` rows, above which room is given back."""
        return self.growth**2 * count + (self.least if count >= self.small else 0)
