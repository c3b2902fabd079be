"""Incoming: a stream of another memory, as a mechanism takes it into one of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from attrs import define
from torch import Tensor

from mplus.memory.merging.order import Order, Shift
from mplus.memory.state import StreamState, StreamView
from mplus.memory.writing.update import WriteContext
from mplus.rows import NO_SOURCE, MemoryRows
from mplus.stores.access_log import NEVER, READS, AccessLog
from mplus.stores.base import StoreView


@define(frozen=True, eq=False)
class Incoming:
    """A stream that is taken into another one.

    Attributes:
        view: of it.
        numbers: of its sources, by number, those that they have in the stream that takes it in.
        order: of what both have written.
        lifetime: merges that a long-term row lives under the policy of the stream that takes it in; None: none expires.
        begun: whether the streams began with the same rows of a checkpoint, which are then left out.
    """

    view: StreamView
    numbers: Mapping[int, int]
    order: Order
    lifetime: float | None = None
    begun: bool = False

    def sources(self, numbers: Tensor) -> Tensor:
        """Return the numbers ``[n]`` int64 that sources have in the stream that takes them in."""
        known = torch.tensor([NO_SOURCE, *sorted(self.numbers)], device=numbers.device)
        new = torch.tensor([NO_SOURCE, *(self.numbers[number] for number in sorted(self.numbers))]).to(known)
        return new[torch.searchsorted(known, numbers)]

    def merged(
        self, name: str, own: Sequence[MemoryRows], theirs: Sequence[MemoryRows], state: StreamState
    ) -> list[MemoryRows]:
        """Return the rows of a list of both streams, layer by layer, in order of birth.

        Rows whose births count back from the present clock keep them, and those of this stream come behind the others.

        Args:
            name: of the list.
            own: the rows of the stream that takes them in.
            theirs: those of this stream.
            state: of the stream that takes them in, as it was.
        """
        merged = []
        for rows, new in zip(own, theirs, strict=True):
            kept = new.select(new.source != NO_SOURCE) if self.begun else new
            parts = [(rows, state, self.order.own), (kept, self.view.state, self.order.other)]
            births = [_shifted(part.birth, name, of, shift) for part, of, shift in parts]
            both = MemoryRows.cat(
                [
                    rows.replace(birth=births[0]),
                    kept.replace(birth=births[1], source=self.sources(kept.source)).to(rows.birth.device),
                ]
            )
            counting_back = bool((both.birth < 0).any())
            merged.append(both if counting_back else both.select(both.birth.argsort(stable=True)))
        return merged

    def take_stored(self, state: StreamState, context: WriteContext) -> None:
        """Put all long-term rows into the store of a stream, in order of birth, behind those that keep their birth.

        The rows there that get another birth are taken out and put in again; notes on what was retrieved move along.

        Args:
            state: of that stream.
            context: of it.
        """
        layers = context.store.layout.layers
        elapsed = state.expiry_clock(layers) - self.view.state.expiry_clock(layers)
        since = state.expiry_clock(layers) + (self.lifetime or 0.0)
        for layer in range(layers):
            store, log = context.store, context.access_log
            ids, births = store.ids(layer), _column(store, layer, "birth")
            rows, times = self._stored(layer)
            if rows.expiry is not None:
                rows = rows.replace(expiry=rows.expiry + float(elapsed[layer]))
            elif store.layout.expiry:  # their lifetime begins now
                rows = rows.replace(expiry=torch.full_like(rows.birth, float(since[layer]), dtype=torch.float64))
            rows = rows if store.layout.expiry else rows.replace(expiry=None)
            moves, used = self.order.own(births) != births, _used(log, layer, ids, self.order.own)
            again = store.gather(layer, ids[moves])
            both = MemoryRows.cat([again.replace(birth=self.order.own(again.birth)), rows.to(births.device)])
            order = both.birth.argsort(stable=True)
            store.remove(layer, ids[moves])
            store.append(layer, both.select(order))
            if log is not None:
                moved = torch.cat([used[moves], times.to(used)])[order]
                log.set_times(layer, store.ids(layer), torch.cat([used[~moves], moved]))

    def _stored(self, layer: int) -> tuple[MemoryRows, Tensor]:
        """Return the long-term rows of a layer with new births and sources, and when each was retrieved last."""
        store = self.view.store
        ids = store.ids(layer)
        if self.begun:
            ids = ids[_column(store, layer, "source") != NO_SOURCE]
        rows = store.gather(layer, ids)
        rows = rows.replace(birth=self.order.other(rows.birth), source=self.sources(rows.source))
        return rows, _used(self.view.access_log, layer, ids, self.order.other)


def _column(store: StoreView, layer: int, name: str) -> Tensor:
    found = store.column(layer, "birth" if name == "birth" else "source")
    return torch.empty_like(store.ids(layer)) if found is None else found


def _shifted(births: Tensor, name: str, state: StreamState, shift: Shift) -> Tensor:
    """Return the new births of rows of a list, but for those that count back from the present clock."""
    return torch.where(state.births(name, births, state.clock) == births, shift(births), births)


def _used(log: AccessLog | None, layer: int, ids: Tensor, shift: Shift) -> Tensor:
    """Return when each row was retrieved last, ``[n]`` int64 or ``NEVER``, by the clock of the merged stream."""
    if log is None:
        return torch.full_like(ids, NEVER)
    times = log.times(layer, ids)
    clock = shift(times // READS - 1) + 1  # a time says how many rows had been written
    return torch.where(times == NEVER, times, clock * READS + times % READS)
