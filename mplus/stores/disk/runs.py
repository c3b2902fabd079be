"""Runs: the rows of one layer as an immutable value, a sequence of runs of rows that lie together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from attrs import define, evolve
from torch import Tensor

from mplus.rows import MemoryRows
from mplus.stores.base import Located
from mplus.stores.disk.holders import Buffer, Holder

if TYPE_CHECKING:
    from collections.abc import Collection

    from mplus.stores.base import StoreLayout

SMALLEST_BUFFER = 16
"""Rows."""


@define(frozen=True, eq=False)
class Run:
    """The rows ``start .. stop-1`` of a holder, but for those that were removed.

    Attributes:
        holder: has the columns; shared with other runs.
        start, stop: places in the holder; the first and the last row are never removed ones.
        live: ``[stop - start]`` bool; None: none was removed.
        count: rows that are left, at least one.
    """

    holder: Holder
    start: int
    stop: int
    live: Tensor | None
    count: int

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
        found = list(self._found(ids))
        if len(found) == 1:
            run, _, places = found[0]
            return MemoryRows.of({name: run.holder.take(name, places) for name in described})
        columns = {name: torch.empty(len(ids), *shape, dtype=dtype) for name, (shape, dtype) in described.items()}
        for run, wanted, places in found:
            first, count = int(wanted[0]), wanted.shape[0]
            together = int(wanted[-1]) - first == count - 1  # as always where ids ascend
            for name, column in columns.items():
                if together:
                    torch.index_select(run.holder.around(name, places), 0, places, out=column[first : first + count])
                else:
                    column[wanted] = run.holder.take(name, places)
        return MemoryRows.of(columns)

    def locate(self, name: str, ids: Tensor) -> Located:
        """Where the rows with these ids lie. Raises KeyError as ``gather``."""
        found = list(self._found(ids))
        parts = [(run.holder.around(name, places), places) for run, _, places in found]
        return Located(parts, None if len(found) == 1 else torch.cat([wanted for _, wanted, _ in found]).argsort())

    def _found(self, ids: Tensor) -> Iterator[tuple[Run, Tensor, Tensor]]:
        """Runs that have any of ``ids``, which of them, and their places in the holder."""
        missing = torch.ones(len(ids), dtype=torch.bool)
        found = []
        numbers = torch.searchsorted(self._lasts, ids)
        for number in numbers.unique().tolist():
            if number == len(self.runs):
                continue
            run, wanted = self.runs[number], (numbers == number).nonzero().squeeze(1)
            asked, present = ids[wanted], run.ids
            places = torch.searchsorted(present, asked)
            known = present[places] == asked
            if run.live is not None:
                known &= run.live[places]
            missing[wanted[known]] = False
            found.append((run, wanted, places + run.start))
        if bool(missing.any()):
            raise KeyError(f"no row with id {int(ids[missing][0])}")
        return iter(found)

    @cached_property
    def _lasts(self) -> Tensor:
        return torch.tensor([int(run.ids[-1]) for run in self.runs], dtype=torch.int64)

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
            return self._with((*self.runs[:-1], grown))
        in_memory = sum(run.count for run in self.runs if run.holder.in_memory)
        buffer = Buffer(self.layout, max(count, in_memory, SMALLEST_BUFFER))  # so that there are few, and little room
        buffer.claim(0, count)
        buffer.write(0, columns)
        return self._with((*self.runs, Run(buffer, 0, count, None, count)))

    def remove(self, ids: Tensor) -> Runs:
        """These without the rows with ``ids`` (any order, repeats allowed). Raises KeyError as ``gather``."""
        changed: dict[int, Run | None] = {}
        for run, _, places in self._found(ids.unique()):
            left = run.without(places)
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
