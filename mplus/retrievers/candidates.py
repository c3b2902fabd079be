"""Ranking a few rows of a layer exactly, after something cheaper has chosen them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from mplus.errors import InputError
from mplus.retrievers.base import Selection, top_k
from mplus.retrievers.scores import score_rows
from mplus.stores.base import StoreView


def rank(score: str, text: Tensor, ids: Tensor, keys: Tensor, k: int) -> Selection:
    """Select the ``min(k, n)`` best of some rows by a score, in float32: descending, ties by lowest id.

    Args:
        score: its name, of ``mplus.retrievers.scores``.
        text: ``[T, r]`` queries of one text.
        ids: ``[n]`` int64, different from each other, in any order.
        keys: ``[n, r]`` of these rows.
        k: largest number of rows to return.
    """
    ids, order = ids.sort()
    scores = score_rows(score, [text], keys)[0].to(ids.device)
    return top_k(scores[order], ids, k)


def keys_of(store: StoreView, layer: int, ids: Tensor) -> Tensor:
    """Gather keys ``[n, r]`` of the rows with these ids, wherever those are. Raises InputError where rows have none."""
    ids = ids.to(store.layout.device)
    return needed(store.gather(layer, ids, leave_out=("hidden", "projected", "expiry")).key, layer)


def needed(keys: Tensor | None, layer: int) -> Tensor:
    """Return ``keys``. Raises InputError (a ValueError) where there are none."""
    if keys is None:
        raise InputError(f"this retriever needs rows with keys; those of layer {layer} have none (key_size=0)")
    return keys


def same_store(stores: Sequence[StoreView]) -> Iterator[tuple[StoreView, list[int]]]:
    """Yield each store once, with the batch rows it is given for."""
    shared: dict[int, list[int]] = {}
    for row, store in enumerate(stores):
        shared.setdefault(id(store), []).append(row)
    for rows in shared.values():
        yield stores[rows[0]], rows
