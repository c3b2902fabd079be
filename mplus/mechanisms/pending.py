"""A store and the rows waiting to be merged into it, seen as one."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from attrs import define
from torch import Tensor

from mplus.rows import MemoryRows
from mplus.stores.base import Column, Content, StoreView


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
        return torch.arange(self.count(layer), device=self.store.ids(layer).device)

    def count(self, layer: int) -> int:
        return self.store.count(layer) + len(self.pending[layer])

    def column(self, layer: int, name: Column) -> Tensor | None:
        merged = self.store.column(layer, name)
        waiting = self.pending[layer].columns().get(name)
        return merged if merged is None or waiting is None else torch.cat([merged, waiting.to(merged)])

    def gather(self, layer: int, ids: Tensor, leave_out: Collection[Column | Content] = ()) -> MemoryRows:
        merged = self.store.count(layer)
        stored = self.store.ids(layer)
        waiting = self.pending[layer]
        missing = (ids < 0) | (ids >= merged + len(waiting))
        if bool(missing.any()):
            raise KeyError(f"no row with id {int(ids[missing][0])} in layer {layer}")
        from_store = self.store.gather(layer, stored[ids[ids < merged]]).replace(expiry=None)
        from_pending = waiting.select(ids[ids >= merged] - merged)
        order = torch.cat([(ids < merged).nonzero().squeeze(1), (ids >= merged).nonzero().squeeze(1)])
        return MemoryRows.cat([from_store, from_pending]).select(order.argsort())
