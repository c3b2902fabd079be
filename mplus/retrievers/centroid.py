"""CentroidRetriever: every row is scored by a summary of the text, and the best of them exactly."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import torch
from attrs import define, field
from torch import Tensor

from mplus.config import number, whole
from mplus.retrievers.base import Selection, check_selection
from mplus.retrievers.candidates import keys_of, needed, rank, same_store
from mplus.retrievers.linear import LinearRetriever
from mplus.retrievers.ranking import best_rows
from mplus.retrievers.scores import piece_rows
from mplus.stores.base import StoreView


class CentroidRetriever(LinearRetriever):
    """A shortcut for the score "sigmoid_mean" with the parameters of ``linear``: fewer products for a long text.

    The text's queries are summarised by a few weighted centroids, all rows are scored with those, and the best
    ``oversample`` times as many as are wanted are scored exactly. Unlike a search for nearest neighbours this follows
    the saturation of the sigmoid: rows that many tokens like a little come before those that one token likes much.

    It ranks exactly as ``linear`` where there is nothing to gain: with the score "mean_dot", whose text is one query
    already; with texts of no more tokens than centroids; with hardly more rows than are wanted.
    """

    @define(frozen=True, kw_only=True)
    class Options(LinearRetriever.Options):
        """Size of the summary.

        Attributes:
            centroids: queries that stand for those of a text.
            steps: of k-means, by which they are found.
            oversample: how many times as many rows as are wanted are scored exactly.
        """

        centroids: int = field(default=16, validator=whole(1))
        steps: int = field(default=2, validator=whole(1))
        oversample: float = field(default=4.0, validator=number(1))

    options: Options
    name: ClassVar[str] = "centroid"

    def select(
        self, layer: int, queries: Tensor, query_mask: Tensor, stores: Sequence[StoreView], k: int
    ) -> list[Selection]:
        """Pick nearly the ``min(k, count)`` best rows for each batch row; a store given for several is read once."""
        check_selection(queries, query_mask, stores, k)
        wanted = int(self.options.oversample * k)
        found: dict[int, Selection] = {}
        exact: list[int] = []
        for store, rows in same_store(stores):
            long = [row for row in rows if int(query_mask[row].sum()) > self.options.centroids]
            if self.options.score == "mean_dot" or not 0 < wanted < store.count(layer):
                long = []
            exact += [row for row in rows if row not in long]
            if long:
                texts = [queries[row][query_mask[row]] for row in long]
                for row, text, ids in zip(long, texts, self._candidates(layer, texts, store, wanted), strict=True):
                    found[row] = rank(self.options.score, text, ids, keys_of(store, layer, ids), k)
        if exact:
            views = [stores[row] for row in exact]
            selections = super().select(layer, queries[exact], query_mask[exact], views, k)
            found.update(zip(exact, selections, strict=True))
        return [found[row] for row in range(len(stores))]

    @torch.no_grad()
    def _candidates(self, layer: int, texts: Sequence[Tensor], store: StoreView, wanted: int) -> list[Tensor]:
        """Return ids of the rows that score best by the summary of each text."""
        summaries = [summarise(text.float(), self.options.centroids, self.options.steps) for text in texts]
        chunks = store.chunks(layer, "key")
        for chunk in chunks:
            needed(chunk.columns.get("key"), layer)
        score = partial(weighted_sigmoids, summaries)
        return [ids for ids, _ in best_rows(chunks, len(texts), wanted, score)]


def summarise(queries: Tensor, count: int, steps: int) -> tuple[Tensor, Tensor]:
    """Summarise the queries of a text by centroids: k-means from queries that are spread evenly over it.

    Args:
        queries: ``[T, r]`` float32, T of at least 1.
        count: most centroids.
        steps: of k-means, at least 1.

    Returns:
        ``[c, r]`` centroids and ``[c]`` weights, the share of the queries that each stands for; c is at most
        ``count``. Without more queries than ``count`` these are the queries.
    """
    total = queries.shape[0]
    if total <= count:
        return queries, queries.new_full((total,), 1 / total)
    centers = queries[torch.arange(count, device=queries.device) * total // count]
    sizes = queries.new_zeros(count)
    for _ in range(steps):
        nearest = (queries @ centers.T - centers.square().sum(1) / 2).argmax(1)
        sizes = nearest.bincount(minlength=count).to(queries.dtype)
        sums = torch.zeros_like(centers).index_add_(0, nearest, queries)
        centers = torch.where(sizes[:, None] > 0, sums / sizes[:, None].clamp(min=1), centers)
    used = sizes > 0
    return centers[used], sizes[used] / total


def weighted_sigmoids(summaries: Sequence[tuple[Tensor, Tensor]], keys: Tensor) -> Tensor:
    """Compute ``sum_c weight_c sigmoid(centroid_c . k)`` for each of several texts and every key.

    Args:
        summaries: of each text, as ``summarise`` gives them.
        keys: ``[m, r]`` on any device and in any dtype; moved to the centroids and upcast in pieces.

    Returns:
        ``[texts, m]`` float32 on the device of the centroids.
    """
    centers = torch.cat([center for center, _ in summaries])
    weights = torch.block_diag(*(weight[:, None] for _, weight in summaries))  # [all centroids, texts]
    found = torch.empty(keys.shape[0], len(summaries), device=centers.device)
    piece = piece_rows(centers.shape[0], centers.device)
    with torch.autocast(centers.device.type, enabled=False):
        for start in range(0, keys.shape[0], piece):
            part = keys[start : start + piece].to(device=centers.device, dtype=torch.float32)
            found[start : start + piece] = (part @ centers.T).sigmoid_() @ weights
    return found.T
