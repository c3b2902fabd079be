"""A store and the rows waiting to be merged into it, seen as one."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from attrs import define
from torch import Tensor

from mplus.rows import MemoryRows
from mplus.stores.base import Chunk, Column, Content, StoreView


@define(eq=False)
class PendingView(StoreView):
    """Rows of ``store`` followed by ``pending``; ids are positions in that order, 0..m+p-1."""

    store: StoreView
    pending: Sequence[MemoryRows]

    @property
    def layout(self):  # type: ignore[no-untyped-def, override]
        """Layout of the store."""
        return self.store.layout

    def ids(self, layer: int) -> Tensor:
        return torch.arange(self.count(layer), device=self.store.layout.device)

    def count(self, layer: int) -> int:
        return self.store.count(layer) + len(self.pending[layer])

    def column(self, layer: int, name: Column) -> Tensor | None:
        merged = self.store.column(layer, name)
        waiting = self.pending[layer].columns().get(name)
        return merged if merged is None or waiting is None else torch.cat([merged, waiting.to(merged)])

    def chunks(self, layer: int, *names: Column | Content) -> list[Chunk]:
        """The chunks of the store, and the rows that wait; a place without a row has the id of the row before it."""
        found, start = [], 0
        for chunk in self.store.chunks(layer, *names):
            if chunk.live is None:
                ids = torch.arange(start, start + len(chunk.ids), device=chunk.ids.device)
                start += len(chunk.ids)
            else:
                ids = chunk.live.cumsum(0) + (start - 1)
                start += int(chunk.live.sum())
            found.append(Chunk(ids, chunk.live, chunk.columns))
        waiting = self.pending[layer].columns()
        columns = {name: waiting[name] for name in names if name in waiting}
        device = self.store.layout.device
        ids = torch.arange(start, start + len(self.pending[layer]), device=device)
        return [*found, Chunk(ids, None, {name: column.to(device) for name, column in columns.items()})]

    def gather(self, layer: int, ids: Tensor, leave_out: Collection[Column | Content] = ()) -> MemoryRows:
        merged = self.store.count(layer)
        waiting = self.pending[layer]
        missing = (ids < 0) | (ids >= merged + len(waiting))
        if bool(missing.any()):
            raise KeyError(f"no row with id {int(ids[missing][0])} in layer {layer}")
        stored, later = (ids < merged).nonzero().squeeze(1), (ids >= merged).nonzero().squeeze(1)
        unread = {*leave_out, "expiry"}  # rows that wait have none
        from_store = self.store.gather(layer, self.store.ids(layer)[ids[stored]], leave_out)
        parts = [
            MemoryRows.of({name: column for name, column in rows.columns().items() if name not in unread})
            for rows in (from_store, waiting.select(ids[later] - merged))
        ]
        return MemoryRows.cat(parts).select(torch.cat([stored, later]).argsort())
