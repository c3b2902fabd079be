"""A retriever for mplus that brings back the newest long-term memory rows, whatever the text says."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mplus.retrievers.base import Retriever, Selection
from mplus.stores.base import StoreView

__all__ = ["RecencyRetriever"]


class RecencyRetriever(Retriever):
    """Newest rows first, by birth; ties by lowest id. Needs no keys and has no parameters.

    Scores are the births as float32. The order is that of the births themselves, so it stays exact beyond 2**24 rows.
    """

    name = "recency"

    def select(
        self, layer: int, queries: Tensor, query_mask: Tensor, stores: Sequence[StoreView], k: int
    ) -> list[Selection]:
        """The ``min(k, count)`` newest rows of ``layer`` for each batch row; the text only counts rows."""
        return [_newest(layer, store, k) for store in stores]


def _newest(layer: int, store: StoreView, k: int) -> Selection:
    births = store.column(layer, "birth")
    if births is None:
        raise ValueError(f"a store must keep the births of its rows, {type(store).__name__} has none in layer {layer}")
    newest = births.argsort(descending=True, stable=True)[:k]
    return Selection(store.ids(layer)[newest], births[newest].to(torch.float32))
