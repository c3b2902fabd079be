"""Ranking a few rows of a layer exactly, after something cheaper has chosen them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from mplus.errors import InputError
from mplus.retrievers.base import Selection, top_k
from mplus.retrievers.scores import score_rows
from mplus.stores.base import StoreView


def rank(score: str, text: Tensor, store: StoreView, layer: int, ids: Tensor, k: int) -> Selection:
    """The ``min(k, n)`` best of the rows ``ids`` by a score, in float32: score descending, ties by lowest id.

    Args:
        score: its name, of ``mplus.retrievers.scores``.
        text: ``[T, r]`` queries of one text.
        store, layer: where the rows are.
        ids: ``[n]`` int64, different from each other, in any order.
        k: largest number of rows to return.
    """
    ids = ids.sort().values
    keys = store.gather(layer, ids, leave_out=("hidden", "projected", "expiry")).key
    if keys is None:
        raise InputError(f"rows to be ranked must have keys, those of layer {layer} have none")
    return top_k(score_rows(score, [text], keys)[0].to(ids.device), ids, k)


def same_store(stores: Sequence[StoreView]) -> Iterator[tuple[StoreView, list[int]]]:
    """Each store once, with the batch rows it is given for."""
    shared: dict[int, list[int]] = {}
    for row, store in enumerate(stores):
        shared.setdefault(id(store), []).append(row)
    for rows in shared.values():
        yield stores[rows[0]], rows
