"""RamStore: long-term rows in memory, on the CPU or on a device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import attrs
import torch
from attrs import define, evolve, field
from torch import Tensor

from mplus.errors import ConfigError, MemoryMismatchError
from mplus.stores.base import Column, Content, MemoryStore, StoreLayout, StoreView
from mplus.stores.log import RowLog

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from mplus.rows import MemoryRows


def _above_one(_: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 < value < float("inf"):
        raise ConfigError(f"{attribute.name} must be a finite number above 1, got {value!r}")


class _Logs(StoreView):
    """Reads one ``RowLog`` per layer."""

    def __init__(self, layout: StoreLayout, logs: Sequence[RowLog]) -> None:
        self.layout = layout
        self.logs = logs

    def ids(self, layer: int) -> Tensor:
        """``[m]`` int64, ascending."""
        return self._log(layer).ids

    def column(self, layer: int, name: Column) -> Tensor | None:
        """One column in the order of ``ids``, without a copy; None where the layout has no such column."""
        return self._log(layer).column(name)

    def content(self, layer: int, name: Content) -> Tensor | None:
        """A column of content in the order of ``ids``, without a copy; None where the layout has no such column."""
        return self._log(layer).column(name)

    def count(self, layer: int) -> int:
        """Number of rows."""
        return len(self._log(layer))

    def gather(self, layer: int, ids: Tensor, leave_out: Collection[Column | Content] = ()) -> MemoryRows:
        """Copies of the rows with these ids. Raises KeyError naming a missing one."""
        log = self._log(layer)
        return log.gather(self._positions(log, layer, ids), leave_out)

    def _log(self, layer: int) -> RowLog:
        if not 0 <= layer < self.layout.layers:
            raise IndexError(f"layer must be in 0..{self.layout.layers - 1}, got {layer}")
        return self.logs[layer]

    @staticmethod
    def _positions(log: RowLog, layer: int, ids: Tensor) -> Tensor:
        try:
            return log.positions(ids)
        except KeyError as error:
            raise KeyError(f"{error.args[0]} in layer {layer}") from None


class RamView(_Logs):
    """What a ``RamStore`` held at one moment."""

    def __init__(self, layout: StoreLayout, logs: Sequence[RowLog], origin: object) -> None:
        super().__init__(layout, logs)
        self.origin = origin


class RamStore(_Logs, MemoryStore):
    """Rows in preallocated buffers that grow by a factor.

    Appending costs what it adds (amortised), evicting the oldest rows nothing; snapshots, forks and restores share
    buffers until one side writes where another already has, and then copy that layer once. Forks may be used from
    different threads; one store must not be changed by two threads at a time, but its snapshots may be read meanwhile.
    """

    @define(frozen=True, kw_only=True)
    class Options(MemoryStore.Options):
        """How much room is kept.

        Attributes:
            growth: factor by which a full buffer grows. At capacity a layer takes up to this many times the room of
                its rows, and every row is copied about ``1 / (growth - 1)`` times in its life.
        """

        growth: float = field(default=2.0, validator=_above_one)

    options: Options
    name: ClassVar[str] = "ram"

    def __init__(self, layout: StoreLayout, options: Any = None) -> None:
        MemoryStore.__init__(self, layout, options)
        self.logs: list[RowLog] = [RowLog.empty(layout, self.options.growth) for _ in range(layout.layers)]

    def append(self, layer: int, rows: MemoryRows) -> Tensor:
        """Copy ``rows`` in, cut off from their autograd history."""
        before = self._log(layer)
        after = before.append(rows)
        self.logs[layer] = after
        return after.ids[len(before) :]

    def remove(self, layer: int, ids: Tensor) -> None:
        """Delete rows: the oldest or the newest without moving any other, rows in between by moving the layer."""
        log = self._log(layer)
        self.logs[layer] = log.remove(self._positions(log, layer, ids))

    def snapshot(self) -> RamView:
        """A view of the present rows; it keeps their buffers alive."""
        return RamView(self.layout, tuple(self.logs), self.origin)

    def restore(self, snapshot: StoreView) -> None:
        """Go back to a snapshot. Raises MemoryMismatchError when it is of another kind of store or layout."""
        if not isinstance(snapshot, RamView) or snapshot.layout != self.layout:
            raise MemoryMismatchError(
                f"restore takes a snapshot of this store ({self.layout}), "
                f"got a {type(snapshot).__name__} ({getattr(snapshot, 'layout', None)})"
            )
        self.logs = [evolve(then, next_id=now.next_id) for then, now in zip(snapshot.logs, self.logs, strict=True)]

    def fork(self) -> RamStore:
        """A store that shares this one's buffers until either of them writes."""
        return self._with(self.layout, list(self.logs))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> RamStore:
        """The same rows and ids elsewhere; a fork when neither device nor dtype changes."""
        layout = evolve(
            self.layout,
            device=self.layout.device if device is None else torch.device(device),
            dtype=self.layout.dtype if dtype is None else dtype,
        )
        return self.fork() if layout == self.layout else self._with(layout, [log.to(layout) for log in self.logs])

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers; forks that share one count it each."""
        return sum(log.buffer.nbytes for log in self.logs)

    def _with(self, layout: StoreLayout, logs: list[RowLog]) -> RamStore:
        store = type(self)(layout, self.options)
        store.logs = logs
        return store
