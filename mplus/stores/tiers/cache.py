"""RowCache: the rows of one layer that one tier holds, in a fixed number of bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from attrs import define
from torch import Tensor

from mplus.stores.base import ordinary_tensors
from mplus.stores.disk.locks import ProcessLock

WAYS = 16
"""Places that a row can go to."""
FIRST_SETS = 32
"""Sets with which a cache begins, at least (where there is room for so many), and less than twice that."""
LABEL_BYTES = 24
"""Of a place: the key of its row, when that was last used, and half of both for the labels of a cache that doubles."""
PIECE_BYTES = 2**24

Described = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape of one row and dtype of columns, by name."""


@define(frozen=True, eq=False)
class Table:
    """Places of a cache: sets of ``ways`` places, all of a set in one block, blocks one behind the other.

    Attributes:
        sets: how many there are.
        keys: ``[sets * ways]`` int64, of the row at each place; -1: none.
        used: ``[sets * ways]`` int64, when it was last used; -1: no row.
        starts: first place of each block.
        blocks: columns by name; the second has as many places as the first, each other as all before it.
    """

    sets: int
    keys: Tensor
    used: Tensor
    starts: Sequence[int]
    blocks: Sequence[Mapping[str, Tensor]]


class RowCache:
    """A set-associative cache: a row may lie in ``WAYS`` places, and the least recently used of these makes room.

    Finding and replacing n rows costs n, however large the cache is. It takes up its room as rows come, by doubling
    (linear hashing: a set divides, and half of its rows move into a new block); nothing is let go for that. The labels
    are on the CPU, the rows on the device.

    The caller holds ``lock`` around a call and what it does with places that were found. Rows are known by keys
    (int64, at least 0) and never change under one.

    Attributes:
        rows: how many are here.
    """

    def __init__(self, described: Described, budget: int, device: torch.device, *, pinned: bool = False) -> None:
        """``budget``: bytes, labels included. ``pinned``: the rows are in page-locked memory."""
        self._lock = ProcessLock()
        self.rows = 0
        self.row_bytes = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in described.values())
        self.place_bytes = self.row_bytes + LABEL_BYTES
        self._described, self._device, self._pinned = described, device, pinned
        places = budget // self.place_bytes
        self._ways = min(WAYS, places)
        sets = places // max(1, self._ways)
        # The table begins small and doubles; it begins with that number of sets from which doublings end at the budget.
        self._doublings = max(0, (sets // FIRST_SETS).bit_length() - 1)
        self._first_sets = sets >> self._doublings
        nothing = torch.empty(0, dtype=torch.int64)
        self._table = Table(0, nothing, nothing, (), ())
        self._clock = 0

    @property
    def lock(self) -> AbstractContextManager[bool]:
        """The lock that a caller holds."""
        return self._lock.here()

    @property
    def nbytes(self) -> int:
        """Bytes of all places, labels included."""
        return self._table.sets * self._ways * self.place_bytes

    @property
    def full(self) -> bool:
        """True if every place that the budget allows has a row."""
        return self.rows == (self._first_sets << self._doublings) * self._ways

    def find(self, keys: Tensor) -> Tensor:
        """Return the places ``[n]`` of the rows with these keys, -1 where a row is not here. Marks them as used."""
        places = self._places(keys)
        self._clock += 1
        self._table.used[places[places >= 0]] = self._clock
        return places

    def parts(self, places: Tensor) -> Iterator[tuple[Mapping[str, Tensor], Tensor, Tensor]]:
        """Yield blocks that have any of ``places``: columns, which of the places, and where in the block these are."""
        table = self._table
        if not len(places):
            return
        if len(table.blocks) == 1:
            yield table.blocks[0], torch.arange(len(places)), places
            return
        number = torch.searchsorted(torch.tensor(table.starts), places, right=True) - 1
        for block, (start, columns) in enumerate(zip(table.starts, table.blocks, strict=True)):
            which = (number == block).nonzero().squeeze(1)
            if len(which):
                yield columns, which, places[which] - start

    def put(self, keys: Tensor, columns: Mapping[str, Tensor], *, displace: bool = True) -> None:
        """Put in copies of rows, as far as there are places; those that are here already stay as they are.

        Args:
            keys: ``[n]``, none twice.
            columns: all columns of the cache, ``[n, ...]``, on its device.
            displace: others may make room; otherwise only free places are taken.
        """
        new = (self._places(keys) < 0).nonzero().squeeze(1)
        if not self._first_sets or not len(new) or (self.full and not displace):
            return
        self._make_room(len(new))
        table = self._table
        sets = keys[new] % table.sets
        by_set = sets.argsort(stable=True)
        ordered = sets[by_set]
        rank = torch.arange(len(ordered)) - torch.searchsorted(ordered, ordered)  # among the new rows of its set
        fits = rank < self._ways
        new, ordered, rank = new[by_set][fits], ordered[fits], rank[fits]
        oldest = table.used.view(table.sets, self._ways)[ordered].argsort(stable=True, dim=1)  # free places first
        places = ordered * self._ways + oldest.gather(1, rank[:, None]).squeeze(1)
        if not displace:
            free = table.keys[places] < 0
            places, new = places[free], new[free]
        self._write(keys, columns, new, places)

    def drop(self, keys: Tensor) -> None:
        """Let the rows with these keys go, those that are here."""
        places = self._places(keys)
        self._vacate(places[places >= 0])

    def _places(self, keys: Tensor) -> Tensor:
        table = self._table
        if not self.rows:
            return torch.full_like(keys, -1)
        sets = keys % table.sets
        same = table.keys.view(table.sets, self._ways)[sets] == keys[:, None]
        return torch.where(same.any(1), sets * self._ways + same.byte().argmax(1), -1)

    def _vacate(self, places: Tensor) -> None:
        gone = int((self._table.keys[places] >= 0).sum())
        self._table.keys[places] = -1
        self._table.used[places] = -1
        self.rows -= gone

    def _write(self, keys: Tensor, columns: Mapping[str, Tensor], rows: Tensor, places: Tensor) -> None:
        """Put ``rows`` of what is given at ``places``."""
        rows, order = rows.sort()
        places = places[order]
        self._vacate(places)  # who interrupts us finds no row that is not there
        with ordinary_tensors():
            for block, which, within in self.parts(places):
                chosen, at = rows[which].to(self._device), within.to(self._device)
                for name, column in block.items():
                    given = columns[name]
                    column.index_copy_(0, at, given if len(chosen) == len(given) else given.index_select(0, chosen))
        self._clock += 1
        self._table.keys[places] = keys[rows]
        self._table.used[places] = self._clock
        self.rows += len(places)

    def _make_room(self, more: int) -> None:
        """Make room for ``more`` rows, so that few of a set are in each other's way."""
        if not self._table.sets:
            self._table = self._doubled()
        while len(self._table.blocks) <= self._doublings and self._table.sets * self._ways * 3 < (self.rows + more) * 4:
            self._table = self._doubled()

    def _doubled(self) -> Table:
        """Return the present table and as many new places."""
        table = self._table
        new = table.sets or self._first_sets
        start, count = table.sets * self._ways, new * self._ways
        with ordinary_tensors():
            block = {
                name: torch.empty(count, *shape, dtype=dtype, device=self._device, pin_memory=self._pinned)
                for name, (shape, dtype) in self._described.items()
            }
            keys, used = (torch.full((start + count,), -1, dtype=torch.int64) for _ in range(2))
            keys[:start], used[:start] = table.keys, table.used
            leaving = ((table.keys >= 0) & (table.keys % (2 * new) >= new)).nonzero().squeeze(1)
            for places in leaving.split(max(1, PIECE_BYTES // max(1, self.row_bytes))):
                for columns, which, at in self.parts(places):
                    target = places[which].to(self._device)  # a set r becomes the sets r and r + n
                    for name, column in block.items():
                        column.index_copy_(0, target, columns[name].index_select(0, at.to(self._device)))
            for label in (keys, used):
                label[leaving + start] = label[leaving]
                label[leaving] = -1
        return Table(table.sets + new, keys, used, (*table.starts, start), (*table.blocks, block))
