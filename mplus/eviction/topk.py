"""Partial top-k: the rows of a layer that come first by some keys, one chunk at a time, without sorting all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from mplus.stores.base import Chunk

SortKeys = Callable[[Chunk], Sequence[Tensor]]
"""Keys ``[m]`` of the rows of a chunk, the most important first; of equal rows the one with the lower id is first."""


def topk_rows(
    chunks: Iterable[Chunk], count: int, sort_keys: SortKeys, lower_bound: Callable[[Chunk], float] | None = None
) -> Tensor:
    """Return the ids of the ``count`` rows that come first, ascending: ``[count]`` int64, or all rows if fewer.

    Args:
        chunks: of one layer, with the columns that ``sort_keys`` looks at.
        count: at least 0.
        sort_keys: gives the keys to compare by; what it gives for a place without a row does not matter.
        lower_bound: the smallest first key that a row of a chunk can have, known without looking at them: chunks whose
            rows cannot be among the first are skipped then.
    """
    ids: Tensor | None = None
    keys: list[Tensor] = []
    chunks = [chunk for chunk in chunks if len(chunk.ids)]
    for chunk in chunks if lower_bound is None else sorted(chunks, key=lower_bound):
        full = lower_bound is not None and ids is not None and len(ids) == count
        if full and (not count or lower_bound(chunk) > keys[0].max()):  # type: ignore[misc]
            break  # with equal keys it may yet have lower ids
        own_ids, own = chunk.ids, list(sort_keys(chunk))
        places = None if chunk.live is None else chunk.live.nonzero().squeeze(1)
        if places is not None:
            own_ids, own = own_ids[places], [key[places] for key in own]
        places = _smallest(own, count)
        own_ids, own = own_ids[places], [key[places] for key in own]
        # What is kept so far is never more than `count` rows, however many chunks there are.
        ids = own_ids if ids is None else torch.cat([ids, own_ids])
        keys = own if not keys else [torch.cat(pair) for pair in zip(keys, own, strict=True)]
        if lower_bound is not None:  # chunks were not visited in the order of their ids
            by_id = ids.argsort()
            ids, keys = ids[by_id], [key[by_id] for key in keys]
        if ids.shape[0] > count:
            places = _smallest(keys, count)
            ids, keys = ids[places], [key[places] for key in keys]
    return torch.empty(0, dtype=torch.int64) if ids is None else ids


def _smallest(keys: Sequence[Tensor], count: int) -> Tensor:
    """Return places, ascending, of the ``count`` smallest by the first key, among equals by the next, then by place."""
    key = keys[0]
    if count >= key.shape[0]:
        return torch.arange(key.shape[0], device=key.device)
    if count == 0:
        return torch.arange(0, device=key.device)
    last = key.topk(count, largest=False, sorted=False).values.max()
    below, tied = (key < last).nonzero().squeeze(1), (key == last).nonzero().squeeze(1)
    wanted = count - below.shape[0]
    if len(keys) > 1 and wanted < tied.shape[0]:
        tied = tied[_smallest([other[tied] for other in keys[1:]], wanted)]
    return torch.cat([below, tied[:wanted]]).sort().values
