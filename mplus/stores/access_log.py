"""Usage: when rows of a store were last retrieved, noted beside the memory by the reads of it."""

from __future__ import annotations

from itertools import count

import torch
from attrs import define, field
from torch import Tensor

from mplus.stores.base import StoreView

READS = 2**20
"""Reads that can be told apart between two rows written. Times are ``clock * READS`` and up, ``clock`` in rows."""

NEVER = -(2**63)
"""The time of a row that was not retrieved."""

LOOSE = 64
"""Notes that are collected before they are joined."""

SPARE = 4096
"""Notes on rows that have left are kept in this number at least, since looking for them costs something."""

Notes = tuple[Tensor, Tensor | int]
"""Ids ``[n]`` and when they were retrieved: ``[n]`` int64 with the ids ascending, or one time for all."""


@define(eq=False)
class _Layer:
    """Notes by number; of several on one row the latest counts. ``now``: the time of the last read."""

    notes: dict[int, Notes] = field(factory=dict)
    now: int = NEVER
    numbers: count[int] = field(factory=count)

    def exchange(self, old: dict[int, Notes], new: Notes) -> None:
        """Put ``new`` in the place of ``old``; what others note meanwhile stays."""
        self.notes[next(self.numbers)] = new
        for number in old:
            self.notes.pop(number, None)


@define(frozen=True, eq=False)
class LayerUsage:
    """Notes on one layer at one moment: ids ``[n]`` int64 ascending, and the last time of each, ``[n]`` int64."""

    ids: Tensor
    last: Tensor

    def times(self, ids: Tensor) -> Tensor:
        """``[m]`` int64 on the device of ``ids``: when each was retrieved last, or ``NEVER``."""
        if not self.ids.shape[0]:
            return torch.full_like(ids, NEVER)
        known, times = self.ids.to(ids.device), self.last.to(ids.device)
        place = torch.searchsorted(known, ids).clamp(max=known.shape[0] - 1)
        return times[place].masked_fill(known[place] != ids, NEVER)


class Usage:
    """Notes on one stream. Safe to use from several threads; the memory itself does not change by them.

    A time says when in the life of the stream a row was retrieved: rows written before then have a smaller
    ``(birth + 1) * READS``. Kept on the CPU.
    """

    # No locks: a read that is interrupted must not leave one behind. Single operations on a dict are indivisible, and
    # a note that is there twice, on its own and joined with others, does no harm.

    def __init__(self) -> None:
        self._layers: dict[int, _Layer] = {}

    def note(self, layer: int, ids: Tensor, clock: int) -> None:
        """The rows ``ids`` (``[n]`` int64) of ``layer`` were retrieved when ``clock`` rows had been written."""
        own = self._layers.setdefault(layer, _Layer())
        own.now = time = max(own.now + 1, clock * READS + 1)  # the same for reads at the very same time
        own.notes[next(own.numbers)] = (ids.detach(), time)
        if len(own.notes) > LOOSE:
            notes = own.notes.copy()
            own.exchange(notes, _joined(notes))

    def at(self, layer: int) -> LayerUsage:
        """The notes on one layer as they are now."""
        own = self._layers.get(layer)
        return LayerUsage(*_joined({} if own is None else own.notes.copy()))

    def times(self, layer: int, ids: Tensor) -> Tensor:
        """``[m]`` int64 on the device of ``ids``: when each was retrieved last, or ``NEVER``."""
        return self.at(layer).times(ids)

    def replace(self, layer: int, ids: Tensor, times: Tensor) -> None:
        """Let there be notes on just these rows (``ids`` ascending) of ``layer``, with these times (or ``NEVER``)."""
        own = self._layers.setdefault(layer, _Layer())
        noted = times > NEVER
        ids, times = ids[noted].to("cpu"), times[noted].to("cpu")
        own.now = max(own.now, int(times.max()) if times.shape[0] else NEVER)
        own.exchange(own.notes.copy(), (ids, times))

    def trim(self, layer: int, store: StoreView) -> None:
        """Drop the notes on rows that have left ``store``, if there may be more of these than rows in it."""
        own = self._layers.get(layer)
        if own is not None and sum(len(ids) for ids, _ in own.notes.copy().values()) > 2 * store.count(layer) + SPARE:
            ids = store.ids(layer)
            self.replace(layer, ids, self.times(layer, ids))

    def fork(self) -> Usage:
        """Notes of their own, so far the same."""
        twin = Usage()
        for layer, own in self._layers.copy().items():
            twin._layers[layer] = _Layer(now=own.now)
            twin._layers[layer].exchange({}, _joined(own.notes.copy()))
        return twin


def _joined(notes: dict[int, Notes]) -> tuple[Tensor, Tensor]:
    """All of them as one: ids ``[n]`` ascending, and the last time of each."""
    ids, times = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
    for rows, when in notes.values():
        ids.append(rows.to("cpu"))
        times.append(torch.full((rows.shape[0],), when) if isinstance(when, int) else when)
    known, place = torch.cat(ids).unique(return_inverse=True)
    return known, torch.full_like(known, NEVER).scatter_reduce(0, place, torch.cat(times), "amax")
