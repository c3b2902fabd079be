"""Runs: the rows of one layer as an immutable value, a sequence of runs of rows that lie together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from attrs import define, evolve, field
from torch import Tensor

from mplus.errors import MemoryFileError
from mplus.rows import MemoryRows
from mplus.stores.base import Located
from mplus.stores.disk.segment_source import Buffer, Holder
from mplus.stores.disk.verified import take

if TYPE_CHECKING:
    from collections.abc import Collection

    from mplus.stores.base import StoreLayout

SMALLEST_BUFFER = 16
"""Rows."""


@define(frozen=True, eq=False, slots=False)
class Run:
    """The rows ``start .. stop-1`` of a holder, but for those that were removed.

    Attributes:
        holder: has the columns; shared with other runs.
        start, stop: places in the holder; the first and the last row are never removed ones.
        live: ``[stop - start]`` bool; None: none was removed.
        count: rows that are left, at least one.
        inherited: as in ``Piece``.
    """

    holder: Holder
    start: int
    stop: int
    live: Tensor | None
    count: int
    inherited: dict[str, Any] = field(factory=dict, init=False, repr=False)

    @property
    def ids(self) -> Tensor:
        """``[stop - start]`` int64, ascending, of removed rows too."""
        return self.holder.read("id", self.start, self.stop)

    def read(self, name: str) -> Tensor:
        """``[stop - start, ...]``, of removed rows too, where it lies."""
        return self.holder.read(name, self.start, self.stop)

    def column(self, name: str) -> Tensor:
        """``[count, ...]``; where it lies, if none was removed."""
        return self.read(name) if self.live is None else self.holder.take(name, self.places)

    @property
    def places(self) -> Tensor:
        """``[count]`` int64: places in the holder of the rows that are left."""
        if self.live is None:
            return torch.arange(self.start, self.stop)
        return self.live.nonzero().squeeze(1) + self.start

    @cached_property
    def bounds(self) -> tuple[int, int]:
        """The first and the last id."""
        first, last = (self.holder.read("id", place, place + 1) for place in (self.start, self.stop - 1))
        return int(first), int(last)

    def find(self, ids: Tensor) -> Tensor:
        """Places in the holder of the rows with these ids (``[n]`` int64, ascending, n of at least 1, none above all).

        Raises KeyError naming one that is not there.
        """
        first, last = self.bounds
        if last - first == self.stop - self.start - 1:  # nothing has to be read
            places = ids - first
            known = places >= 0
        else:
            present = self.ids
            places = torch.searchsorted(present, ids)
            known = present[places] == ids
        if self.live is not None:
            known &= self.live[places.clamp(min=0)]
        if not bool(known.all()):
            raise KeyError(f"no row with id {int(ids[~known][0])}")
        return places + self.start

    def without(self, places: Tensor) -> Run | None:
        """What is left without the rows at ``places`` (of the holder; distinct, ascending, not removed yet)."""
        count = self.count - places.shape[0]
        if count == 0:
            return None
        start, stop = self.start, self.stop
        if self.live is None:  # the usual cases, at a cost that does not grow with the run
            if int(places[-1]) == start + places.shape[0] - 1:
                return evolve(self, start=start + places.shape[0], count=count)
            if int(places[0]) == stop - places.shape[0]:
                return evolve(self, stop=stop - places.shape[0], count=count)
        live = torch.ones(stop - start, dtype=torch.bool) if self.live is None else self.live.clone()
        live[places - start] = False
        left = live.nonzero().squeeze(1)
        first, last = int(left[0]), int(left[-1]) + 1
        whole = count == last - first
        return Run(self.holder, start + first, start + last, None if whole else live[first:last], count)


@define(frozen=True, eq=False, slots=False)
class Runs:
    """The rows of one layer. Changing them makes a new value; the old one keeps its rows.

    Attributes:
        layout: what the rows look like.
        runs: in the order of their ids.
    """

    layout: StoreLayout
    runs: tuple[Run, ...] = ()

    def __len__(self) -> int:
        return sum(run.count for run in self.runs)

    @cached_property
    def ids(self) -> Tensor:
        """``[m]`` int64, ascending."""
        return self.column("id")

    def column(self, name: str) -> Tensor:
        """``[m, ...]``; where it lies if it is in one piece."""
        if len(self.runs) == 1:
            return self.runs[0].column(name)
        shape, dtype = ((), torch.int64) if name == "id" else self.layout.columns()[name]
        return torch.cat([torch.empty(0, *shape, dtype=dtype), *(run.column(name) for run in self.runs)])

    def gather(self, ids: Tensor, leave_out: Collection[str] = ()) -> MemoryRows:
        """Copies of the rows with these ids. Raises KeyError naming one that is not there."""
        described = {name: facts for name, facts in self.layout.columns().items() if name not in leave_out}
        found, order = self._found(ids)
        columns = {}
        for name, (shape, dtype) in described.items():
            columns[name] = torch.empty(len(ids), *shape, dtype=dtype)
            take([(run.holder.column(name), places) for run, places in found], columns[name])
        if order is not None:
            columns = {name: column.index_select(0, order) for name, column in columns.items()}
        return MemoryRows.of(columns)

    def locate(self, name: str, ids: Tensor) -> Located:
        """Where the rows with these ids lie. Raises KeyError as ``gather``."""
        found, order = self._found(ids)
        return Located([(run.holder.around(name, places), places) for run, places in found], order)

    def _found(self, ids: Tensor) -> tuple[list[tuple[Run, Tensor]], Tensor | None]:
        """Runs that have any of ``ids``, and the places of these in the holder; and ``Located.order``."""
        order, ids = None, ids.cpu()
        if not bool((ids[1:] >= ids[:-1]).all()):
            ids, ranks = ids.sort()
            order = ranks.argsort()
        found, begin = [], 0
        *counts, beyond = torch.searchsorted(self._lasts, ids).bincount(minlength=len(self.runs) + 1).tolist()
        for run, count in zip(self.runs, counts, strict=True):
            if count:
                found.append((run, run.find(ids[begin : begin + count])))
                begin += count
        if beyond:
            raise KeyError(f"no row with id {int(ids[begin])}")
        return found, order

    @cached_property
    def _lasts(self) -> Tensor:
        bounds = [run.bounds for run in self.runs]
        if not all(first <= last for first, last in bounds) or not all(
            before[1] < behind[0] for before, behind in pairwise(bounds)
        ):
            raise MemoryFileError(f"ids must ascend from one file of rows to the next, got {bounds}: they were altered")
        return torch.tensor([last for _, last in bounds], dtype=torch.int64)

    def append(self, ids: Tensor, rows: MemoryRows) -> Runs:
        """These and copies of ``rows`` behind them, under ``ids`` (``[n]``, ascending, above those there are)."""
        count = len(rows)
        if count == 0:
            return self
        last = self.runs[-1] if self.runs else None
        columns = {"id": ids, **rows.columns()}
        if last is not None and isinstance(last.holder, Buffer) and last.holder.claim(last.stop, count):
            last.holder.write(last.stop, columns)
            live = last.live
            if live is not None:
                live = torch.cat([live, torch.ones(count, dtype=torch.bool)])
            grown = evolve(last, stop=last.stop + count, count=last.count + count, live=live)
            grown.inherited.update(last.inherited)
            return self._with((*self.runs[:-1], grown))
        in_memory = sum(run.count for run in self.runs if run.holder.in_memory)
        buffer = Buffer(self.layout, max(count, in_memory, SMALLEST_BUFFER))  # so that there are few, and little room
        buffer.claim(0, count)
        buffer.write(0, columns)
        return self._with((*self.runs, Run(buffer, 0, count, None, count)))

    def remove(self, ids: Tensor) -> Runs:
        """These without the rows with ``ids`` (any order, repeats allowed). Raises KeyError as ``gather``."""
        changed: dict[int, Run | None] = {}
        for run, places in self._found(ids.unique())[0]:
            left = run.without(places)
            if left is not None:
                left.inherited.update(run.inherited)
            changed[id(run)] = left if left is None else self._shrunk(left)
        if not changed:
            return self
        runs = (changed.get(id(run), run) for run in self.runs)
        return self._with(tuple(run for run in runs if run is not None))

    def _shrunk(self, run: Run) -> Run:
        """A run in a smaller buffer, where most of its own is unused; the rest as they are."""
        if not isinstance(run.holder, Buffer) or run.holder.capacity <= max(4 * run.count, SMALLEST_BUFFER):
            return run
        buffer = Buffer(self.layout, 2 * run.count)
        buffer.claim(0, run.count)
        buffer.write(0, {name: run.column(name) for name in buffer.columns})
        return Run(buffer, 0, run.count, None, run.count)

    def _with(self, runs: tuple[Run, ...]) -> Runs:
        return Runs(self.layout, runs)

    @property
    def bytes_in_memory(self) -> int:
        """Bytes of the rows, removed ones included, that are not in files."""
        places = sum(run.stop - run.start for run in self.runs if run.holder.in_memory)
        return places * (self.layout.row_bytes + 8)


def holders(runs: Iterable[Runs]) -> Sequence[Holder]:
    """Each holder once."""
    return list({id(run.holder): run.holder for layer in runs for run in layer.runs}.values())
