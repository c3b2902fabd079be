"""UnpinnedRows: the rows of a store that may leave it, for an eviction policy to choose from."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from mplus.rows import MemoryRows
from mplus.stores.base import Chunk, Column, Content, StoreView


class UnpinnedRows(StoreView):
    """A view of a store without the rows of some sources, which are pinned.

    Example:
        >>> import torch
        >>> from mplus.eviction import FifoEviction
        >>> free = UnpinnedRows(store, pinned=torch.tensor([0]))
        >>> FifoEviction().select(free, layer=0, excess=1)
        tensor([1])
    """

    def __init__(self, store: StoreView, pinned: Tensor) -> None:
        """``pinned``: ``[p]`` int64, numbers of the sources whose rows are left out."""
        self.layout = store.layout
        self._store, self._pinned = store, pinned

    def chunks(self, layer: int, *names: Column | Content) -> list[Chunk]:
        """Return the chunks of the store, in which pinned rows count as removed."""
        found = []
        for chunk in self._store.chunks(layer, *dict.fromkeys((*names, "source"))):
            free = ~torch.isin(chunk.columns["source"], self._pinned.to(chunk.ids.device))
            if not bool(free.all()):
                # With caches of its own: what is found out of some of the rows must not be taken for all of them.
                live = free if chunk.live is None else free & chunk.live
                found.append(Chunk(chunk.ids, live, chunk.columns))
            else:
                found.append(chunk)
        return found

    def ids(self, layer: int) -> Tensor:
        """Return ``[m]`` int64, ascending."""
        pieces = [chunk.ids if chunk.live is None else chunk.ids[chunk.live] for chunk in self.chunks(layer)]
        return torch.cat([torch.empty(0, dtype=torch.int64, device=self.layout.device), *pieces])

    def column(self, layer: int, name: Column) -> Tensor | None:
        """Return one column of the rows in the order of ``ids``."""
        found = self._store.column(layer, name)
        return None if found is None else found[torch.searchsorted(self._store.ids(layer), self.ids(layer))]

    def gather(self, layer: int, ids: Tensor, leave_out: Collection[Column | Content] = ()) -> MemoryRows:
        """Return rows by their ids."""
        return self._store.gather(layer, ids, leave_out)
