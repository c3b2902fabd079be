"""FaissIvfRetriever: an index finds the rows whose keys fit the text's mean query, and the best of them are ranked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from attrs import define, field
from torch import Tensor

from mplus.config import JsonValue, flag, number, whole
from mplus.retrievers.base import Retriever, RetrieverShape, Selection, check_selection
from mplus.retrievers.candidates import keys_of, rank, same_store
from mplus.retrievers.index_cache import IndexCache
from mplus.retrievers.linear import LinearRetriever
from mplus.stores.base import StoreView


class FaissIvfRetriever(LinearRetriever):
    """The parameters of ``linear``, and of the rows only those in a few cells of an index are looked at.

    For the score "mean_dot", which is an inner product, rows are missed only where they lie in cells that are not
    looked into. For "sigmoid_mean" the rows near the mean query are no more than a guess at those that many tokens
    like: on drawn keys, texts of 6 topics lost from 1 % to 39 % of the best rows, and where keys lie in no clusters
    more than half (``docs/benchmarks/retrieval.md``). ``mplus eval retriever`` measures it on a memory of one's own,
    and ``centroid`` is made for that score.

    The first read of a layer with ``least`` rows trains its index and says so in the log; later reads add and remove
    what has changed. Below that, and for rows whose ids do not last (those waiting for a merge), it reads as
    ``linear``. Scores are exact whatever finds the rows: float32, ties by lowest id. Which rows are found can depend on
    when the index was trained. An index is kept in main memory, whatever the device of the rows, and holds the keys
    once more, in float32.
    """

    @define(frozen=True, kw_only=True)
    class Options(LinearRetriever.Options):
        """Size of the index and of the search.

        Attributes:
            least: rows a layer must have to get an index; with fewer, scoring all of them is as fast.
            cells: cells of an index; None: two square roots of the rows it is trained on.
            probes: cells looked into by a read, more where they hold too few rows; None: 32, one in 64,
                or as many as hold four times the rows wanted, whichever is most.
            oversample: for "sigmoid_mean", how many times as many rows as are wanted are scored exactly.
            outgrown: an index is made anew when this many times as many rows have come as it was trained on.
            gpu: search a copy of each index on the first GPU, made anew after every change of the rows; for memories
                that are read much more than written. Reads that want more than 2,048 rows stay on the CPU. Not yet run
                on a GPU.
        """

        least: int = field(default=20_000, validator=whole(1))
        cells: int | None = field(default=None, validator=whole(1, optional=True))
        probes: int | None = field(default=None, validator=whole(1, optional=True))
        oversample: float = field(default=4.0, validator=number(1))
        outgrown: float = field(default=3.0, validator=number(0))
        gpu: bool = field(default=False, validator=flag)

    options: Options
    name: ClassVar[str] = "faiss_ivf"

    def __init__(self, shape: RetrieverShape, options: Retriever.Options | None = None) -> None:
        super().__init__(shape, options)
        chosen = self.options
        self.index_cache = IndexCache(max(chosen.least, chosen.cells or 1), chosen.cells, chosen.outgrown, chosen.gpu)

    def select(
        self, layer: int, queries: Tensor, query_mask: Tensor, stores: Sequence[StoreView], k: int
    ) -> list[Selection]:
        """Pick ``min(k, count)`` rows for each batch row, nearly the best; see the class."""
        check_selection(queries, query_mask, stores, k)
        found: dict[int, Selection] = {}
        for store, rows in same_store(stores):
            texts = [queries[row][query_mask[row]] for row in rows]
            candidates = self._candidates(layer, texts, store, k) if 0 < k < store.count(layer) else None
            if candidates is None:
                views = [store] * len(rows)
                selections = super().select(layer, queries[rows], query_mask[rows], views, k)
            else:
                pairs = zip(texts, candidates, strict=True)
                selections = [rank(self.options.score, text, *some, k) for text, some in pairs]
            found.update(zip(rows, selections, strict=True))
        return [found[row] for row in range(len(stores))]

    def index_facts(self, layer: int, store: StoreView) -> dict[str, JsonValue]:
        """Return the size of the index that serves reads of this layer; {} where all rows are scored."""
        with self.index_cache.synced(store, layer) as ready:
            if ready is None:
                return {}
            index = ready.index
            return {"rows": len(index), "cells": index.cells, "trained_on": index.trained_on, "added": index.added}

    def sync_index(self, store: StoreView) -> None:
        """Bring the indexes of a store up to its rows. No index is made that was not there."""
        self.index_cache.sync(store)

    def index_tensors(self, layer: int, store: StoreView) -> dict[str, Tensor]:
        """Return the index of a layer as a few tensors, to be saved beside its rows; {} where there is none.

        They take 4 bytes a row and 4 r a cell: the keys are those of the rows.
        """
        return self.index_cache.tensors(store, layer)

    def load_index(self, layer: int, store: StoreView, tensors: Mapping[str, Tensor]) -> None:
        """Build a layer's index from what ``index_tensors`` gave for the same rows, instead of training it.

        Raises:
            InputError: the tensors are not of an index over these rows: leave them, and the next read trains one.
        """
        self.index_cache.load(store, layer, dict(tensors))

    @torch.no_grad()
    def _candidates(
        self, layer: int, texts: Sequence[Tensor], store: StoreView, k: int
    ) -> list[tuple[Tensor, Tensor]] | None:
        """Find ids and keys to rank for each text; None: there is no index, or a query that is not finite."""
        means = [text.float().mean(0) for text in texts]
        if not all(bool(mean.isfinite().all()) for mean in means):
            return None
        with self.index_cache.synced(store, layer) as ready:
            if ready is None:
                return None
            # A few more than wanted: faiss adds products up in another order, which can turn close ones round.
            wanted = int(self.options.oversample * k) if self.options.score == "sigmoid_mean" else k + k // 16 + 4
            index = ready.index
            enough = round(4 * wanted * index.cells / max(len(index), 1))  # cells that hold four times the rows wanted
            probes = self.options.probes or max(32, index.cells // 64, enough)
            besides = ready.added
            others = keys_of(store, layer, besides).float().cpu() if len(besides) else None
            found = []
            for mean in means:
                ids = index.search(mean, wanted, probes, ready.removed)
                keys = index.keys(ids)
                if others is not None:
                    ids, keys = torch.cat([ids, besides]), torch.cat([keys, others])
                found.append((ids.to(store.layout.device), keys.to(mean.device)))
            return found
