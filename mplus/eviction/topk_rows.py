"""Finding the rows of a layer that come first in some order, one piece at a time and without sorting all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from mplus.stores.base import Piece

Order = Callable[[Piece], Sequence[Tensor]]
"""Keys ``[m]`` of the rows of a piece, the most important first; of equal rows the one with the lower id is first."""


def first_rows(
    pieces: Iterable[Piece], count: int, order: Order, least: Callable[[Piece], float] | None = None
) -> Tensor:
    """Ids of the ``count`` rows that come first, ascending (``[count]`` int64, or of all rows where they are fewer).

    Args:
        pieces: of one layer, with the columns that ``order`` looks at.
        count: at least 0.
        order: what rows are compared by; what it says of a place without a row does not matter.
        least: the smallest first key that a row of a piece can have, where that is known without looking at them:
            pieces whose rows cannot be among the first are left alone then.
    """
    ids: Tensor | None = None
    keys: list[Tensor] = []
    pieces = [piece for piece in pieces if len(piece.ids)]
    for piece in pieces if least is None else sorted(pieces, key=least):
        if least is not None and ids is not None and len(ids) == count and (not count or least(piece) > keys[0].max()):
            break  # with equal keys it may yet have lower ids
        own_ids, own = piece.ids, list(order(piece))
        places = None if piece.live is None else piece.live.nonzero().squeeze(1)
        if places is not None:
            own_ids, own = own_ids[places], [key[places] for key in own]
        places = _first(own, count)
        own_ids, own = own_ids[places], [key[places] for key in own]
        # What is kept so far is never more than `count` rows, however many pieces there are.
        ids = own_ids if ids is None else torch.cat([ids, own_ids])
        keys = own if not keys else [torch.cat(pair) for pair in zip(keys, own, strict=True)]
        if least is not None:
            by_id = ids.argsort()
            ids, keys = ids[by_id], [key[by_id] for key in keys]
        if ids.shape[0] > count:
            places = _first(keys, count)
            ids, keys = ids[places], [key[places] for key in keys]
    return torch.empty(0, dtype=torch.int64) if ids is None else ids


def _first(keys: Sequence[Tensor], count: int) -> Tensor:
    """Places, ascending, of the ``count`` smallest by the first key, among equals by the next, then by place."""
    key = keys[0]
    if count >= key.shape[0]:
        return torch.arange(key.shape[0], device=key.device)
    if count == 0:
        return torch.arange(0, device=key.device)
    last = key.topk(count, largest=False, sorted=False).values.max()
    below, tied = (key < last).nonzero().squeeze(1), (key == last).nonzero().squeeze(1)
    wanted = count - below.shape[0]
    if len(keys) > 1 and wanted < tied.shape[0]:
        tied = tied[_first([other[tied] for other in keys[1:]], wanted)]
    return torch.cat([below, tied[:wanted]]).sort().values
