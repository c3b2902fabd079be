"""A retriever for mplus that brings back the newest long-term memory rows, whatever the text says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from mplus.retrievers import Retriever, Selection, StoreView, check_selection, top_k

__all__ = ["RecencyRetriever"]


class RecencyRetriever(Retriever):
    """Scores a row by its birth, so the newest come first; ties by lowest id. Has no keys and no parameters."""

    name: ClassVar[str] = "recency"

    def select(
        self, layer: int, queries: Tensor, query_mask: Tensor, stores: Sequence[StoreView], k: int
    ) -> list[Selection]:
        """The ``min(k, count)`` newest rows of ``layer`` for each batch row, whatever ``queries`` holds."""
        check_selection(queries, query_mask, stores, k)
        return [top_k(_births(store, layer).float(), store.ids(layer), k) for store in stores]


def _births(store: StoreView, layer: int) -> Tensor:
    births = store.column(layer, "birth")
    if births is None:
        raise ValueError(f"a store must keep the births of its rows, {type(store).__name__} has none in layer {layer}")
    return births
