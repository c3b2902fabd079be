"""AccessLog: when rows of a store were last retrieved, recorded beside the memory by the reads of it."""

from __future__ import annotations

from itertools import count

import torch
from attrs import define, field
from torch import Tensor

from mplus.stores.base import StoreView

READS = 2**20
"""Reads that can be told apart between two rows written. Times are ``clock * READS`` and up, ``clock`` in rows."""

NEVER = -(2**63)
"""The time of a row that was never retrieved."""

LOOSE = 64
"""Records that are collected before they are merged into one."""

SPARE = 4096
"""Records of rows that have left that ``AccessLog.trim`` tolerates, since looking for them has a cost."""

LogEntry = tuple[Tensor, Tensor | int]
"""Ids ``[n]`` and when they were retrieved: ``[n]`` int64 with the ids ascending, or one time for all."""


@define(eq=False)
class _LayerLog:
    """Records by number; of several for one row the latest counts. ``now``: the time of the last read."""

    records: dict[int, LogEntry] = field(factory=dict)
    now: int = NEVER
    numbers: count[int] = field(factory=count)

    def exchange(self, old: dict[int, LogEntry], new: LogEntry) -> None:
        """Put ``new`` in the place of ``old``; what other threads record meanwhile stays."""
        self.records[next(self.numbers)] = new
        for number in old:
            self.records.pop(number, None)


@define(frozen=True, eq=False)
class AccessTimes:
    """The log of one layer at one moment.

    Attributes:
        ids: ``[n]`` int64, ascending.
        last: ``[n]`` int64, when each was retrieved last.
    """

    ids: Tensor
    last: Tensor

    def times(self, ids: Tensor) -> Tensor:
        """Return ``[m]`` int64 on the device of ``ids``: when each was retrieved last, or ``NEVER``."""
        if not self.ids.shape[0]:
            return torch.full_like(ids, NEVER)
        known, times = self.ids.to(ids.device), self.last.to(ids.device)
        place = torch.searchsorted(known, ids).clamp(max=known.shape[0] - 1)
        return times[place].masked_fill(known[place] != ids, NEVER)


class AccessLog:
    """When each long-term row of one stream was last retrieved. Safe to use from several threads; kept on the CPU.

    The memory itself does not change by what is recorded. A time says when in the life of the stream a row was
    retrieved: rows written before then have a smaller ``(birth + 1) * READS``.

    Example:
        >>> import torch
        >>> log = AccessLog()
        >>> log.record(0, torch.tensor([7, 3]), clock=2)
        >>> log.times(0, torch.tensor([3, 5])).tolist() == [2 * READS + 1, NEVER]
        True
    """

    # No locks: a read that is interrupted must not leave one behind. Single operations on a dict are indivisible, and
    # a record that is there twice, on its own and merged with others, does no harm.

    def __init__(self) -> None:
        self._layers: dict[int, _LayerLog] = {}

    def record(self, layer: int, ids: Tensor, clock: int) -> None:
        """Record that the rows ``ids`` (``[n]`` int64) of ``layer`` were retrieved after ``clock`` rows written."""
        own = self._layers.setdefault(layer, _LayerLog())
        own.now = time = max(own.now + 1, clock * READS + 1)  # the same for reads at the very same time
        own.records[next(own.numbers)] = (ids.detach(), time)
        if len(own.records) > LOOSE:
            records = own.records.copy()
            own.exchange(records, _merged(records))

    def layer(self, layer: int) -> AccessTimes:
        """Return what is recorded of one layer now; later reads do not change it."""
        own = self._layers.get(layer)
        return AccessTimes(*_merged({} if own is None else own.records.copy()))

    def times(self, layer: int, ids: Tensor) -> Tensor:
        """Return ``[m]`` int64 on the device of ``ids``: when each was retrieved last, or ``NEVER``."""
        return self.layer(layer).times(ids)

    def set_times(self, layer: int, ids: Tensor, times: Tensor) -> None:
        """Replace all records of ``layer``.

        Args:
            layer: index among the layers that carry memory.
            ids: ``[n]`` int64, ascending.
            times: ``[n]`` int64, when each was retrieved last, or ``NEVER``.
        """
        own = self._layers.setdefault(layer, _LayerLog())
        noted = times > NEVER
        ids, times = ids[noted].to("cpu"), times[noted].to("cpu")
        own.now = max(own.now, int(times.max()) if times.shape[0] else NEVER)
        own.exchange(own.records.copy(), (ids, times))

    def trim(self, layer: int, store: StoreView) -> None:
        """Drop the records of rows that have left ``store``, if these may outnumber the rows in it."""
        own = self._layers.get(layer)
        if own is not None and sum(len(ids) for ids, _ in own.records.copy().values()) > 2 * store.count(layer) + SPARE:
            ids = store.ids(layer)
            self.set_times(layer, ids, self.times(layer, ids))

    def fork(self) -> AccessLog:
        """Return a log with the same records; recording in one does not show in the other."""
        twin = AccessLog()
        for layer, own in self._layers.copy().items():
            twin._layers[layer] = _LayerLog(now=own.now)
            twin._layers[layer].exchange({}, _merged(own.records.copy()))
        return twin


def _merged(records: dict[int, LogEntry]) -> tuple[Tensor, Tensor]:
    """Merge records into one: ids ``[n]`` ascending, and the last time of each."""
    ids, times = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
    for rows, when in records.values():
        ids.append(rows.to("cpu"))
        times.append(torch.full((rows.shape[0],), when) if isinstance(when, int) else when)
    known, place = torch.cat(ids).unique(return_inverse=True)
    return known, torch.full_like(known, NEVER).scatter_reduce(0, place, torch.cat(times), "amax")
