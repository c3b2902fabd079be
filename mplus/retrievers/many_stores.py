"""Ranking the rows of many small stores at once, each by the queries of its own text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from attrs import define
from torch import Tensor

from mplus.retrievers.ranking import ranks_of, top, unranked
from mplus.retrievers.scores import score_into
from mplus.stores.base import Chunk

SMALL = 2**13
"""Places of a store that is ranked with others, at most: in a larger one what is saved by it does not count."""
PLACES = 2**18
"""Places of all stores that are ranked at once, those that are filled up to the largest one included."""
_LEAST = torch.iinfo(torch.int64).min


@define(frozen=True, eq=False)
class Searched:
    """The rows of one store, and the text that asks for some of them.

    Attributes:
        text: ``[T, r]`` queries.
        chunks: of the store, with the column "key".
        count: rows that there are.
    """

    text: Tensor
    chunks: Sequence[Chunk]
    count: int

    @property
    def places(self) -> int:
        """The places in all chunks, those of removed rows included."""
        return sum(chunk.ids.shape[0] for chunk in self.chunks)

    @property
    def small(self) -> bool:
        """True if it is worth while to rank its rows together with those of others."""
        device = self.text.device
        return self.count > 0 and self.places <= SMALL and all(chunk.ids.device == device for chunk in self.chunks)


@torch.no_grad()
def best_of_each(searched: Sequence[Searched], score: str, k: int) -> list[tuple[Tensor, Tensor]]:
    """Find the ``min(k, count)`` best rows of each of several small stores, as ``ranking.best_rows`` does for one.

    Returns:
        For each ids ``[n]`` int64 and scores ``[n]``: score descending, ties by lowest id.
    """
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for some in _alike([one.places for one in searched]):
        found.update(zip(some, _best([searched[place] for place in some], score, k), strict=True))
    return [found[place] for place in range(len(searched))]


def _alike(places: Sequence[int]) -> Iterator[list[int]]:
    """Yield the numbers of stores of similar size, as many together as may be ranked at once."""
    by_size: dict[int, list[int]] = {}
    for number, count in enumerate(places):
        by_size.setdefault(max(count.bit_length(), 8), []).append(number)
    for size, numbers in by_size.items():
        # Stores of this size have fewer than 2**size places each.
        most = max(1, PLACES >> size)
        for start in range(0, len(numbers), most):
            yield numbers[start : start + most]


def _best(searched: Sequence[Searched], score: str, k: int) -> list[tuple[Tensor, Tensor]]:
    places = [one.places for one in searched]
    most = max(places)
    scores = torch.empty(len(searched), most, device=searched[0].text.device)
    removed = []
    for row, one in enumerate(searched):
        start = 0
        for chunk in one.chunks:
            end = start + chunk.ids.shape[0]
            if chunk.live is not None:
                removed.append((row, start, end, ~chunk.live))
            start = end
        score_into(scores[row, :start], score, one.text, [chunk.columns["key"] for chunk in one.chunks])
    place = torch.arange(most, device=scores.device)
    ranks = ranks_of(scores, place)
    if min(places) < most:
        ranks.masked_fill_(place >= torch.tensor(places, device=place.device)[:, None], _LEAST)
    for row, start, end, gone in removed:
        ranks[row, start:end].masked_fill_(gone, _LEAST)
    best, values = unranked(top(ranks, k, last=True))
    found = []
    for one, own, there in zip(searched, best, values, strict=True):
        count = min(k, one.count)
        chunks = [chunk.ids for chunk in one.chunks]
        ids = chunks[0] if len(chunks) == 1 else torch.cat(chunks)
        found.append((ids.index_select(0, own[:count]), there[:count]))
    return found
