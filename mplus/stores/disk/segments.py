"""SegmentedRows: the rows of one layer as an immutable value, a sequence of segments of rows that lie together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from attrs import define, evolve, field
from torch import Tensor

from mplus.errors import MemoryFileError
from mplus.rows import MemoryRows
from mplus.stores.base import ChunkCache, Location
from mplus.stores.disk.segment_source import Buffer, SegmentSource
from mplus.stores.disk.verified import take

if TYPE_CHECKING:
    from collections.abc import Collection

    from mplus.stores.base import StoreLayout

SMALLEST_BUFFER = 16
"""Rows."""


@define(frozen=True, eq=False, slots=False)
class RowSegment:
    """The rows ``start .. stop-1`` of a source, but for those that were removed.

    Attributes:
        source: has the columns; shared with other segments.
        start, stop: places in the source; the first and the last row are never removed ones.
        live: ``[stop - start]`` bool; None: none was removed.
        count: rows that are left, at least one.
        inherited_cache: as in ``Chunk``.
    """

    source: SegmentSource
    start: int
    stop: int
    live: Tensor | None
    count: int
    inherited_cache: ChunkCache = field(factory=ChunkCache, init=False, repr=False)

    @property
    def ids(self) -> Tensor:
        """``[stop - start]`` int64, ascending, of removed rows too."""
        return self.source.read("id", self.start, self.stop)

    def read(self, name: str) -> Tensor:
        """Return ``[stop - start, ...]``, of removed rows too, where it lies."""
        return self.source.read(name, self.start, self.stop)

    def column(self, name: str) -> Tensor:
        """Return ``[count, ...]``; where it lies, if none was removed."""
        return self.read(name) if self.live is None else self.source.take(name, self.places)

    @property
    def places(self) -> Tensor:
        """``[count]`` int64: places in the source of the rows that are left."""
        if self.live is None:
            return torch.arange(self.start, self.stop)
        return self.live.nonzero().squeeze(1) + self.start

    @cached_property
    def bounds(self) -> tuple[int, int]:
        """The first and the last id."""
        first, last = (self.source.read("id", place, place + 1) for place in (self.start, self.stop - 1))
        return int(first), int(last)

    def find(self, ids: Tensor) -> Tensor:
        """Return the places in the source of the rows with these ids (``[n]`` int64, ascending, none above all).

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

    def without(self, places: Tensor) -> RowSegment | None:
        """Return this segment without the rows at ``places`` (of the source; distinct, ascending, not removed yet)."""
        count = self.count - places.shape[0]
        if count == 0:
            return None
        start, stop = self.start, self.stop
        if self.live is None:  # the usual cases, at a cost that does not grow with the segment
            if int(places[-1]) == start + places.shape[0] - 1:  # the oldest rows leave, as under "fifo"
                return evolve(self, start=start + places.shape[0], count=count)
            if int(places[0]) == stop - places.shape[0]:  # the newest rows leave
                return evolve(self, stop=stop - places.shape[0], count=count)
        # Rows go from the middle: from here on the segment needs a mask.
        live = torch.ones(stop - start, dtype=torch.bool) if self.live is None else self.live.clone()
        live[places - start] = False
        left = live.nonzero().squeeze(1)
        first, last = int(left[0]), int(left[-1]) + 1
        whole = count == last - first
        return RowSegment(self.source, start + first, start + last, None if whole else live[first:last], count)


@define(frozen=True, eq=False)
class SegmentLocation:
    """Where rows lie that were looked for.

    Attributes:
        layout: of the rows.
        parts: segments, and the places ``[n_i]`` int64 in the source of each.
        order: as in ``Location``.
    """

    layout: StoreLayout
    parts: Sequence[tuple[RowSegment, Tensor]]
    order: Tensor | None = None

    def located(self, name: str) -> Location:
        """Return one column of these rows, which are checked where they lie."""
        return Location([(segment.source.around(name, places), places) for segment, places in self.parts], self.order)

    def take(self, name: str) -> Tensor:
        """Return a checked copy of one column of these rows."""
        parts = [(segment.source.column(name), places) for segment, places in self.parts]
        if not parts:
            shape, dtype = self.layout.columns()[name]
            return torch.empty(0, *shape, dtype=dtype)
        first = parts[0][0] if isinstance(parts[0][0], Tensor) else parts[0][0].rows
        column = first.new_empty(sum(places.shape[0] for _, places in parts), *first.shape[1:])
        take(parts, column)
        return column if self.order is None else column.index_select(0, self.order)

    def at(self, order: Tensor) -> SegmentLocation:
        """Return those of these rows at ``order`` ``[n]``."""
        if len(self.parts) == 1 and self.order is None:
            ((segment, places),) = self.parts
            return evolve(self, parts=[(segment, places.index_select(0, order))])
        return evolve(self, order=order if self.order is None else self.order[order])


@define(frozen=True, eq=False, slots=False)
class SegmentedRows:
    """The rows of one layer. Changing them makes a new value; the old one keeps its rows.

    Attributes:
        layout: what the rows look like.
        segments: in the order of their ids.
    """

    layout: StoreLayout
    segments: tuple[RowSegment, ...] = ()

    def __len__(self) -> int:
        return sum(segment.count for segment in self.segments)

    @cached_property
    def ids(self) -> Tensor:
        """``[m]`` int64, ascending."""
        return self.column("id")

    def column(self, name: str) -> Tensor:
        """Return ``[m, ...]``; where it lies if it is in one chunk."""
        if len(self.segments) == 1:
            return self.segments[0].column(name)
        shape, dtype = ((), torch.int64) if name == "id" else self.layout.columns()[name]
        return torch.cat([torch.empty(0, *shape, dtype=dtype), *(segment.column(name) for segment in self.segments)])

    def gather(self, ids: Tensor, leave_out: Collection[str] = ()) -> MemoryRows:
        """Return copies of the rows with these ids. Raises KeyError naming one that is not there."""
        found = self.find(ids)
        return MemoryRows.of({name: found.take(name) for name in self.layout.columns() if name not in leave_out})

    def locate(self, name: str, ids: Tensor) -> Location:
        """Return where the rows with these ids lie. Raises KeyError as ``gather``."""
        return self.find(ids).located(name)

    def find(self, ids: Tensor) -> SegmentLocation:
        """Return where the rows with these ids lie. Raises KeyError as ``gather``."""
        order, ids = None, ids.cpu()
        if not bool((ids[1:] >= ids[:-1]).all()):
            ids, ranks = ids.sort()
            # The inverse of the sort: brings what is found back into the order that was asked for.
            order = ranks.argsort()
        found, begin = [], 0
        # Ids are sorted, so those of a segment are neighbours: only how many there are in each has to be known.
        *counts, beyond = torch.searchsorted(self._lasts, ids).bincount(minlength=len(self.segments) + 1).tolist()
        for segment, count in zip(self.segments, counts, strict=True):
            if count:
                found.append((segment, segment.find(ids[begin : begin + count])))
                begin += count
        if beyond:
            raise KeyError(f"no row with id {int(ids[begin])}")
        return SegmentLocation(self.layout, found, order)

    @cached_property
    def _lasts(self) -> Tensor:
        bounds = [segment.bounds for segment in self.segments]
        if not all(first <= last for first, last in bounds) or not all(
            before[1] < behind[0] for before, behind in pairwise(bounds)
        ):
            raise MemoryFileError(f"ids must ascend from one file of rows to the next, got {bounds}: they were altered")
        return torch.tensor([last for _, last in bounds], dtype=torch.int64)

    def append(self, ids: Tensor, rows: MemoryRows) -> SegmentedRows:
        """Return these and copies of ``rows`` behind them, under ``ids`` (``[n]``, ascending, above all others)."""
        count = len(rows)
        if count == 0:
            return self
        last = self.segments[-1] if self.segments else None
        columns = {"id": ids, **rows.columns()}
        # A fork shares the buffer: the first to append gets the places behind the last row, the other a buffer of its
        # own.
        if last is not None and isinstance(last.source, Buffer) and last.source.claim(last.stop, count):
            last.source.write(last.stop, columns)
            live = last.live
            if live is not None:
                live = torch.cat([live, torch.ones(count, dtype=torch.bool)])
            grown = evolve(last, stop=last.stop + count, count=last.count + count, live=live)
            grown.inherited_cache.update(last.inherited_cache)
            return self._with((*self.segments[:-1], grown))
        in_memory = sum(segment.count for segment in self.segments if segment.source.in_memory)
        buffer = Buffer(self.layout, max(count, in_memory, SMALLEST_BUFFER))  # so that there are few, and little room
        buffer.claim(0, count)
        buffer.write(0, columns)
        return self._with((*self.segments, RowSegment(buffer, 0, count, None, count)))

    def remove(self, ids: Tensor) -> SegmentedRows:
        """Return these without the rows with ``ids`` (any order, repeats allowed). Raises KeyError as ``gather``."""
        changed: dict[int, RowSegment | None] = {}
        for segment, places in self.find(ids.unique()).parts:
            left = segment.without(places)
            if left is not None:
                left.inherited_cache.update(segment.inherited_cache)
            changed[id(segment)] = left if left is None else self._shrunk(left)
        if not changed:
            return self
        segments = (changed.get(id(segment), segment) for segment in self.segments)
        return self._with(tuple(segment for segment in segments if segment is not None))

    def _shrunk(self, segment: RowSegment) -> RowSegment:
        """Return a segment in a smaller buffer, where most of its own is unused; others as they are."""
        if not isinstance(segment.source, Buffer) or segment.source.capacity <= max(4 * segment.count, SMALLEST_BUFFER):
            return segment
        buffer = Buffer(self.layout, 2 * segment.count)
        buffer.claim(0, segment.count)
        buffer.write(0, {name: segment.column(name) for name in buffer.columns})
        return RowSegment(buffer, 0, segment.count, None, segment.count)

    def _with(self, segments: tuple[RowSegment, ...]) -> SegmentedRows:
        return SegmentedRows(self.layout, segments)

    @property
    def bytes_in_memory(self) -> int:
        """Bytes of the rows, removed ones included, that are not in files."""
        places = sum(segment.stop - segment.start for segment in self.segments if segment.source.in_memory)
        return places * (self.layout.row_bytes + 8)


def segment_sources(segments: Iterable[SegmentedRows]) -> Sequence[SegmentSource]:
    """Return each source once."""
    return list({id(segment.source): segment.source for layer in segments for segment in layer.segments}.values())
