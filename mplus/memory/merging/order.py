"""Order: when the rows of one stream were written, among those of another that are put between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Self

import torch
from attrs import define
from torch import Tensor

from mplus.memory.sources.table import SourceTable
from mplus.memory.state import StreamView
from mplus.rows import NO_SOURCE

BEFORE, BEHIND = float("-inf"), float("inf")


@define(frozen=True, eq=False)
class Runs:
    """The writing to a stream, cut wherever another source goes on.

    Attributes:
        starts: the birth that each run begins with, ascending.
        times: when each was written, in seconds since 1970, not descending.
        end: the birth behind the last run: the stream's clock.
        known: whether it is known of all sources when they were written.
    """

    starts: Sequence[int]
    times: Sequence[float]
    end: int
    known: bool = True

    @staticmethod
    def of(births: Tensor, sources: Tensor, table: SourceTable, clock: int) -> Runs:
        """Return the runs of the rows with these births and sources (both ``[n]`` int64, births ascending).

        A source is known to have been first written at one time and last at another. Its first run has the first, its
        last one the other, those between them times in equal steps; and no run has one before that of the run before.
        """
        begins = torch.ones(len(sources), dtype=torch.bool)
        begins[1:] = sources[1:] != sources[:-1]
        numbers, starts = sources[begins].tolist(), births[begins].tolist()
        counts = Counter(numbers)
        seen, times = dict.fromkeys(counts, 0), list[float]()
        for number in numbers:
            source = table.get(number)
            if source is None or source.time is None:
                times.append(BEFORE)
                continue
            last = source.time if source.last_time is None else source.last_time
            share = seen[number] / max(counts[number] - 1, 1)
            times.append(source.time + (last - source.time) * share)
            seen[number] += 1
        known = all(time > BEFORE for number, time in zip(numbers, times, strict=True) if number != NO_SOURCE)
        if not starts:
            return Runs([0], [BEHIND], clock)
        # What is gone from the beginning counts to the first run.
        return Runs([min(starts[0], 0), *starts[1:]], list(accumulate(times, max)), clock, known)

    @staticmethod
    def in_view(view: StreamView) -> Runs:
        """Return the runs of all rows that a stream holds."""
        pairs = list(_births(view))
        births, sources = (torch.cat([torch.empty(0, dtype=torch.int64), *part]) for part in zip(*pairs, strict=True))
        order = births.argsort(stable=True)
        return Runs.of(births[order], sources[order], view.state.sources, view.state.clock)

    @property
    def lengths(self) -> list[int]:
        """The number of births that each run takes; those that have left count to the run before them."""
        ends = [*self.starts[1:], self.end]
        return [end - start for start, end in zip(self.starts, ends, strict=True)]


@define(frozen=True, eq=False)
class Shift:
    """New births for those of a stream.

    Attributes:
        starts: ``[r]`` int64, ascending: where runs begin.
        by: ``[r]`` int64, by how much the births of each run grow.
    """

    starts: Tensor
    by: Tensor

    def __call__(self, births: Tensor) -> Tensor:
        """Return the new births ``[n]`` int64 of rows, on their device."""
        place = torch.searchsorted(self.starts.to(births.device), births, right=True) - 1
        # Births in front of the first run move with it.
        shifted: Tensor = births + self.by.to(births.device)[place.clamp(min=0)]
        return shifted


@define(frozen=True, eq=False)
class Order:
    """One order for what two streams have written.

    Runs of both follow one another by their times; where times are equal, and where some are not known, those of the
    own stream come first.

    Example:
        >>> order = Order.of(Runs([0, 4], [10.0, 30.0], 8), Runs([0], [20.0], 3))
        >>> order.own(torch.tensor([0, 4])).tolist(), order.other(torch.tensor([0])).tolist(), order.clock
        ([0, 7], [4], 11)

    Attributes:
        own, other: give rows of either stream their births in the merged one.
        clock: of that.
    """

    own: Shift
    other: Shift
    clock: int

    @classmethod
    def of(cls, own: Runs, other: Runs) -> Self:
        """Return the order of two streams."""
        times = [*own.times, *other.times]
        if not (own.known and other.known):
            times = [BEFORE] * len(own.times) + [BEHIND] * len(other.times)
        places = sorted(range(len(times)), key=times.__getitem__)  # stable: of equal ones, the own stream's first
        starts, lengths = [*own.starts, *other.starts], [*own.lengths, *other.lengths]
        begins, at = dict[int, int](), own.starts[0]
        for place in places:
            begins[place] = at
            at += lengths[place]
        by = torch.tensor([begins[place] - start for place, start in enumerate(starts)], dtype=torch.int64)
        split = len(own.starts)
        known = torch.tensor(starts, dtype=torch.int64)
        return cls(Shift(known[:split], by[:split]), Shift(known[split:], by[split:]), at)


def _births(view: StreamView) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield births and sources of rows list by list, of those whose births say when they were written."""
    none = torch.empty(0, dtype=torch.int64)
    yield none, none
    state = view.state
    for name, parts in state.row_lists().items():
        for rows in parts:
            births = rows.birth.cpu()
            said = births == state.births(name, births, state.clock)  # others count back from the present clock
            yield births[said], rows.source.cpu()[said]
    for layer in range(view.store.layout.layers):
        for chunk in view.store.chunks(layer, "source", "birth"):
            places = slice(None) if chunk.live is None else chunk.live
            yield chunk.columns["birth"][places].cpu(), chunk.columns["source"][places].cpu()
