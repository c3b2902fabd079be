"""RowCache: the rows of one layer that one tier holds, in a fixed number of bytes."""

from __future__ import annotations

from collections.abc import Mapping
from threading import Lock

import torch
from torch import Tensor

from mplus.stores.blocks import ordinary_tensors

WAYS = 16
"""Places that a row can go to."""
FIRST_SETS = 4
LABEL_BYTES = 16
"""Of a place: the key of its row, and when that was last used."""
Described = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape of one row and dtype of columns, by name."""


class RowCache:
    """A set-associative cache: a row may lie in ``WAYS`` places, and the least recently used of these makes room.

    Finding and replacing n rows costs n, however large the cache is, and no row is moved for another. Its room is
    taken as rows come, by doubling, up to the budget; while it moves to a larger room both are within the budget, or
    the rows are let go first. The labels are on the CPU, the rows on the device.

    The caller holds ``lock`` around a call and what it does with places that were found. Rows are known by keys
    (int64, at least 0) and never change under one.
    """

    def __init__(self, described: Described, budget: int, device: torch.device, *, pinned: bool = False) -> None:
        """``budget``: bytes, labels included. ``pinned``: the rows are in page-locked memory."""
        self.lock = Lock()
        self.budget = budget
        self.place_bytes = LABEL_BYTES + sum(
            torch.Size(shape).numel() * dtype.itemsize for shape, dtype in described.values()
        )
        self._described, self._device, self._pinned = described, device, pinned
        most = budget // self.place_bytes
        self._ways = min(WAYS, most)
        self._most_sets = most // max(1, self._ways)
        self._clock = 0
        self._let_go(0)

    def _let_go(self, sets: int) -> None:
        """Begin with ``sets`` sets of empty places."""
        places = sets * self._ways
        self.sets, self.rows = sets, 0
        self.columns: dict[str, Tensor] = {}  # before new ones are made: what was there counts no more
        with ordinary_tensors():
            self._keys = torch.full((places,), -1, dtype=torch.int64)
            self._used = torch.full((places,), -1, dtype=torch.int64)
            self.columns = {
                name: torch.empty(places, *shape, dtype=dtype, device=self._device, pin_memory=self._pinned)
                for name, (shape, dtype) in self._described.items()
            }

    @property
    def nbytes(self) -> int:
        """Bytes of all places, labels included."""
        return self.sets * self._ways * self.place_bytes

    @property
    def full(self) -> bool:
        """Whether every place that the budget allows has a row."""
        return self.rows == self._most_sets * self._ways

    def find(self, keys: Tensor) -> Tensor:
        """``[n]`` int64: places of the rows with these keys ``[n]``, -1 where a row is not here. Marks them as used."""
        places = self._places(keys)
        self._clock += 1
        self._used[places[places >= 0]] = self._clock
        return places

    def take(self, name: str, places: Tensor) -> Tensor:
        """``[n, ...]``: copies of what lies at ``places``, on the device of the cache."""
        return self.columns[name].index_select(0, places.to(self._device, non_blocking=True))

    def put(self, keys: Tensor, columns: Mapping[str, Tensor], *, displace: bool = True) -> None:
        """Copies of rows, as far as there are places; those that are here already stay as they are.

        Args:
            keys: ``[n]``, none twice.
            columns: all columns of the cache, ``[n, ...]``, on its device.
            displace: others may make room; otherwise only free places are taken.
        """
        new = (self._places(keys) < 0).nonzero().squeeze(1)
        if not self._most_sets or not len(new) or (self.full and not displace):
            return
        self._grow(len(new))
        self._clock += 1
        self._write(keys, columns, new, torch.full_like(new, self._clock), displace)

    def drop(self, keys: Tensor) -> None:
        """Let the rows with these keys go, those that are here."""
        places = self._places(keys)
        places = places[places >= 0]
        self._keys[places] = self._used[places] = -1
        self.rows -= len(places)

    def _places(self, keys: Tensor) -> Tensor:
        if not self.rows:
            return torch.full_like(keys, -1)
        sets = keys % self.sets
        same = self._keys.view(self.sets, self._ways)[sets] == keys[:, None]
        return torch.where(same.any(1), sets * self._ways + same.byte().argmax(1), -1)

    def _write(self, keys: Tensor, columns: Mapping[str, Tensor], rows: Tensor, used: Tensor, displace: bool) -> None:
        """Put in ``rows`` of what is given, the first of those that want the same place."""
        sets = keys[rows] % self.sets
        by_set = sets.argsort(stable=True)
        ordered = sets[by_set]
        rank = torch.arange(len(ordered)) - torch.searchsorted(ordered, ordered)  # among the rows of its set
        fits = rank < self._ways
        rows, used, ordered, rank = rows[by_set][fits], used[by_set][fits], ordered[fits], rank[fits]
        oldest = self._used.view(self.sets, self._ways)[ordered].argsort(stable=True, dim=1)  # free places first
        places = ordered * self._ways + oldest.gather(1, rank[:, None]).squeeze(1)
        if not displace:
            free = self._keys[places] < 0
            places, rows, used = places[free], rows[free], used[free]
        self.rows -= int((self._keys[places] >= 0).sum())
        self._keys[places] = self._used[places] = -1  # whoever interrupts us finds these places empty
        with ordinary_tensors():
            at, source = places.to(self._device), rows.to(self._device)
            for name, column in self.columns.items():
                given = columns[name]
                column.index_copy_(0, at, given if len(source) == len(given) and _whole(rows) else given[source])
        self._keys[places], self._used[places] = keys[rows], used
        self.rows += len(places)

    def _grow(self, more: int) -> None:
        """Room for ``more`` rows besides those that are here, so that few of a set are in each other's way."""
        sets = max(self.sets, FIRST_SETS)
        while sets * self._ways * 3 < (self.rows + more) * 4:
            sets *= 2
        sets = min(sets, self._most_sets)
        if sets <= self.sets:
            return
        if not self.rows or self.nbytes + sets * self._ways * self.place_bytes > self.budget:
            self._let_go(sets)
            return
        here = (self._keys >= 0).nonzero().squeeze(1)
        here = here[self._used[here].argsort(descending=True)]  # should a set overflow, its last ones stay out
        keys, used, columns = self._keys[here], self._used[here], self.columns
        self._let_go(sets)
        step = max(1, 2**24 // self.place_bytes)
        for start in range(0, len(here), step):
            part = slice(start, start + step)
            moved = {name: column.index_select(0, here[part].to(self._device)) for name, column in columns.items()}
            self._write(keys[part], moved, torch.arange(len(keys[part])), used[part], displace=False)


def _whole(rows: Tensor) -> bool:
    return bool((rows[1:] > rows[:-1]).all())
