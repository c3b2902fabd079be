"""LruEviction: the rows that were not retrieved for longest leave first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mplus.eviction.base import EvictionPolicy
from mplus.eviction.topk_rows import first_rows
from mplus.stores.access_log import READS, Usage
from mplus.stores.base import Piece, StoreView, smallest


class LruEviction(EvictionPolicy):
    """Least recently retrieved first; a row that was never retrieved counts from when it was written.

    Rows that were last used in the same read leave by birth, the oldest first, ties by lowest id. Rows that wait for a
    merge can be retrieved, but this is noted only once they are in the store.
    """

    name = "lru"
    notes_reads = True

    def __init__(self, options: Any = None, usage: Usage | None = None) -> None:
        """``usage``: notes on the stream that rows are chosen from; None: nothing was ever retrieved."""
        super().__init__(options)
        self.usage = usage

    def using(self, usage: Usage | None) -> LruEviction:
        return LruEviction(self.options, usage)

    def select(self, store: StoreView, layer: int, excess: int) -> Tensor:
        usage = None if self.usage is None else self.usage.at(layer)

        def order(piece: Piece) -> Sequence[Tensor]:
            births = piece.columns["birth"]
            used = (births + 1) * READS
            if usage is not None:
                used = torch.maximum(used, usage.times(piece.ids))
            return [used, births]

        # A row is used no earlier than written, so most pieces need not be looked at.
        def least(piece: Piece) -> float:
            return (smallest(piece, "birth") + 1) * READS

        return first_rows(store.pieces(layer, "birth"), excess, order, least)
