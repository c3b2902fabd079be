"""RowLog: the rows of one layer as an immutable value; many values share one growing buffer."""

from __future__ import annotations

from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from attrs import define, evolve
from torch import Tensor

from mplus.rows import MemoryRows

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from mplus.stores.base import StoreLayout


class RowBuffer:
    """Preallocated columns of equal capacity, the ids among them. A place is written once and never changes.

    Attributes:
        columns: name -> ``[capacity, ...]``; every column of the layout, and ``id``.
        capacity: rows there is room for.
    """

    def __init__(self, layout: StoreLayout, capacity: int) -> None:
        described = {"id": ((), torch.int64), **layout.columns()}
        with _ordinary_tensors():
            self.columns = {
                name: torch.empty(capacity, *shape, dtype=dtype, device=layout.device)
                for name, (shape, dtype) in described.items()
            }
        self.capacity = capacity
        self._tip = 0
        self._lock = Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of all columns, unused places included."""
        return sum(column.numel() * column.element_size() for column in self.columns.values())

    def claim(self, start: int, count: int) -> bool:
        """Reserve the places ``start .. start+count-1`` for the caller, unless anything from ``start`` on is taken."""
        with self._lock:
            if start != self._tip or start + count > self.capacity:
                return False
            self._tip = start + count
            return True

    def write(self, start: int, columns: dict[str, Tensor], index: Tensor | None = None) -> None:
        """Copy rows (those at ``index``, or all) into places that the caller has claimed, without their history."""
        with _ordinary_tensors():
            for name, source in columns.items():
                count = source.shape[0] if index is None else index.shape[0]
                # Through .data: places that others look at stay as they are, so autograd need not hear of this.
                target = self.columns[name].data[start : start + count]
                if index is None:
                    target.copy_(source)
                elif source.dtype == target.dtype and source.device == target.device:
                    torch.index_select(source, 0, index, out=target)
                else:
                    target.copy_(source[index])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=Lock())


@define(frozen=True, eq=False)
class RowLog:
    """The rows ``start .. stop-1`` of a buffer. Changing a log makes a new one; the old one keeps its rows.

    Appending writes behind the rows where that place is still free and moves to a larger buffer otherwise; removing
    rows at an end narrows the log, removing others moves the rest. A buffer is left when it is more than
    ``growth ** 2`` times as large as its rows, so memory and copying per row stay bounded.

    Attributes:
        layout: what the rows look like.
        growth: factor by which a full buffer grows, above 1.
        buffer: holds the rows, shared with other logs.
        start, stop: the part of the buffer that belongs to this log.
        next_id: id of the next row appended; ids are never given twice.
    """

    layout: StoreLayout
    growth: float
    buffer: RowBuffer
    start: int = 0
    stop: int = 0
    next_id: int = 0

    @staticmethod
    def empty(layout: StoreLayout, growth: float) -> RowLog:
        """No rows, no room."""
        return RowLog(layout, growth, RowBuffer(layout, 0))

    def __len__(self) -> int:
        return self.stop - self.start

    def column(self, name: str) -> Tensor | None:
        """``[m, ...]`` view of one column, ``id`` included; None where the layout has no such column."""
        column = self.buffer.columns.get(name)
        return None if column is None else column[self.start : self.stop]

    @property
    def ids(self) -> Tensor:
        """``[m]`` int64, ascending."""
        return self.buffer.columns["id"][self.start : self.stop]

    def positions(self, ids: Tensor) -> Tensor:
        """Positions ``[n]`` of the rows with these ids. Raises KeyError naming the first id that is not there."""
        ids, present = ids.to(self.ids.device), self.ids
        if ids.shape[0] == 0:
            return ids
        if len(self) and int(present[-1]) - int(present[0]) == len(self) - 1:  # no row in between was ever removed
            places = ids - present[0]
            if bool(((places >= 0) & (places < len(self))).all()):
                return places
        found = torch.searchsorted(present, ids)
        known = found < len(self)
        if len(self):
            known &= present[found.clamp(max=len(self) - 1)] == ids
        if not bool(known.all()):
            raise KeyError(f"no row with id {int(ids[~known][0])}")
        return found

    def gather(self, positions: Tensor, leave_out: Collection[str] = ()) -> MemoryRows:
        """Copies of the rows at ``positions``."""
        names = [name for name in self.buffer.columns if name != "id" and name not in leave_out]
        columns = self._columns()
        return MemoryRows.of({name: columns[name].index_select(0, positions) for name in names})

    def append(self, rows: MemoryRows) -> RowLog:
        """This log and copies of ``rows`` behind it. Raises InputError unless they have the layout's columns."""
        self.layout.check(rows)
        count = len(rows)
        if count == 0:
            return self
        log = self
        if not self.buffer.claim(self.stop, count):
            log = self.moved(max(int(self.growth * len(self)), len(self) + count))
            log.buffer.claim(log.stop, count)
        ids = torch.arange(self.next_id, self.next_id + count, device=self.layout.device)
        log.buffer.write(log.stop, {"id": ids, **rows.columns()})
        return evolve(log, stop=log.stop + count, next_id=self.next_id + count)

    def remove(self, positions: Tensor) -> RowLog:
        """This log without the rows at ``positions`` (any order, repeats allowed)."""
        positions = positions.unique()  # sorted
        count = positions.shape[0]
        if count == 0:
            return self
        if int(positions[-1]) == count - 1:
            log = evolve(self, start=self.start + count)
        elif int(positions[0]) == len(self) - count:
            log = evolve(self, stop=self.stop - count)
        else:
            kept = torch.ones(len(self), dtype=torch.bool, device=positions.device)
            kept[positions] = False
            return self.moved(int(self.growth * (len(self) - count)), kept.nonzero().squeeze(1))
        if log.buffer.capacity > self.growth**2 * len(log):
            return log.moved(int(self.growth * len(log)))
        return log

    def to(self, layout: StoreLayout) -> RowLog:
        """The same rows and ids in the dtype and on the device of ``layout``, in a buffer of their own."""
        return evolve(self, layout=layout).moved(len(self))

    def moved(self, capacity: int, kept: Tensor | None = None) -> RowLog:
        """The rows (those at ``kept``, or all) at the beginning of a new buffer."""
        count = len(self) if kept is None else kept.shape[0]
        buffer = RowBuffer(self.layout, max(capacity, count))
        buffer.claim(0, count)
        buffer.write(0, self._columns(), kept)
        return evolve(self, buffer=buffer, start=0, stop=count)

    def _columns(self) -> dict[str, Tensor]:
        return {name: column[self.start : self.stop] for name, column in self.buffer.columns.items()}


@contextmanager
def _ordinary_tensors() -> Iterator[None]:
    """Tensors made inside can be written and differentiated through later, even in a caller's inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield
