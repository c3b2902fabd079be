"""Recall and time of approximate retrieval, against the exact best rows of the same queries."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from functools import partial

import torch
from attrs import define, field
from torch import Tensor

from mplus.config import JsonValue
from mplus.errors import NotSupported
from mplus.evaluation.retriever_swap import Rekeyed
from mplus.retrievers.base import Retriever, Selection, top_k
from mplus.stores.base import StoreView
from mplus.timing import timed

MOST = 64
"""Queries measured in each layer; more tell little and take time."""


@define(eq=False)
class _Sums:
    """Sums of one retriever in one layer: seconds of selections, rows shared with the exact best, and its index."""

    seconds: list[float] = field(factory=list)
    shared: int = 0
    best: int = 0
    index: dict[str, JsonValue] = field(factory=dict)


class Shortcuts:
    """Selections of several retrievers for the same texts and rows, beside the best rows by a decoder's own score.

    Args:
        own: the decoder's retriever.
        retrievers: by name; ``own`` may be among them.
        k: rows selected.
        layers: that carry memory.
    """

    def __init__(self, own: Retriever, retrievers: Mapping[str, Retriever], k: int, layers: int) -> None:
        self.own = own
        self.retrievers = retrievers
        self.k = k
        self._sums = {name: [_Sums() for _ in range(layers)] for name in retrievers}
        self._asked = [0] * layers

    @torch.no_grad()
    def ask(self, layer: int, hidden: Tensor, mask: Tensor, views: Mapping[str, StoreView]) -> None:
        """Let every retriever select once, each time another one first.

        Args:
            layer: index among the layers that carry memory.
            hidden: ``[1, T, d]`` text after the layer's input norm.
            mask: ``[1, T]`` bool, the tokens that retrieve.
            views: the rows as each retriever reads them, by its name, with the same ids in all.
        """
        turn = self._asked[layer]
        if turn >= MOST:
            return
        self._asked[layer] += 1
        names = list(self.retrievers)
        exact = self._exact(layer, hidden, mask, next(iter(views.values())))
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            retriever, sums = self.retrievers[name], self._sums[name][layer]
            queries = retriever.project_queries(layer, hidden)
            run = partial(retriever.select, layer, queries, mask, [views[name]], self.k)
            (selection,) = run()  # brings an index up to date, which is not part of a read
            sums.seconds.append(timed(run, hidden.device))
            sums.index = retriever.index_facts(layer, views[name])
            if exact is not None:
                sums.shared += int(torch.isin(selection.ids, exact.ids).sum())
                sums.best += len(exact.ids)

    def _exact(self, layer: int, hidden: Tensor, mask: Tensor, view: StoreView) -> Selection | None:
        """Return the best rows by the score of the decoder's own retriever; None where it has none."""
        keys = view.keys(layer)
        try:
            every = hidden.new_empty(view.count(layer), 0) if keys is None else keys.to(hidden.device)
            queries = self.own.project_queries(layer, hidden)
            scores = self.own.score(layer, queries, mask, every[None])[0].float()
        except NotSupported:
            return None
        return top_k(scores.to(view.ids(layer).device), view.ids(layer), self.k)

    def plain(self) -> dict[str, dict[str, JsonValue]]:
        """Return for each retriever the share of the exact best rows that it finds, and the time of a selection.

        The time is the median over texts, in milliseconds, of one text; None for a retriever that has no keys kept with
        these rows and makes them anew. ``index_by_layer`` has {} where every row was looked at.
        """
        return {
            name: {
                "overlap_with_exact_by_layer": [round(one.shared / one.best, 4) if one.best else None for one in sums],
                "select_ms_by_layer": [
                    round(1000 * statistics.median(one.seconds), 4)
                    if one.seconds and not isinstance(self.retrievers[name], Rekeyed)
                    else None
                    for one in sums
                ],
                "index_by_layer": [one.index for one in sums],
            }
            for name, sums in self._sums.items()
        }
