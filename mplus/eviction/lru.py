"""LruEviction: the rows that were not retrieved for longest leave first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mplus.eviction.base import EvictionPolicy, topk_rows
from mplus.stores.access_log import READS, AccessLog
from mplus.stores.base import Chunk, StoreView, chunk_min


class LruEviction(EvictionPolicy):
    """Least recently retrieved first; a row that was never retrieved counts from when it was written.

    Rows that were last used in the same read leave by birth, the oldest first, ties by lowest id. Rows that wait for a
    merge can be retrieved, but this is noted only once they are in the store.
    """

    name = "lru"
    needs_access_log = True

    def __init__(self, options: EvictionPolicy.Options | None = None, access_log: AccessLog | None = None) -> None:
        """``access_log``: notes on the stream that rows are chosen from; None: nothing was ever retrieved."""
        super().__init__(options)
        self.access_log = access_log

    def with_access_log(self, access_log: AccessLog | None) -> LruEviction:
        return LruEviction(self.options, access_log)

    def select(self, store: StoreView, layer: int, excess: int) -> Tensor:
        access_log = None if self.access_log is None else self.access_log.layer(layer)

        def order(chunk: Chunk) -> Sequence[Tensor]:
            births = chunk.columns["birth"]
            used = (births + 1) * READS
            if access_log is not None:
                used = torch.maximum(used, access_log.times(chunk.ids))
            return [used, births]

        # A row is used no earlier than written, so most chunks need not be looked at.
        def least(chunk: Chunk) -> float:
            return (chunk_min(chunk, "birth") + 1) * READS

        return topk_rows(store.chunks(layer, "birth"), excess, order, least)
