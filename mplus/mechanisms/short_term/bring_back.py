"""Bringing back the rows that a retriever picked, oldest first, for all batch rows of a layer at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mplus.mechanisms.opened import Retrieved
from mplus.retrievers.base import Selection
from mplus.rows import MemoryRows
from mplus.stores.base import FoundRows, StoreLayout, StoreView


def bring_back_each(
    stores: Sequence[StoreView], layer: int, picks: Sequence[Selection], *, newest_last: bool
) -> list[Retrieved | None]:
    """Return the picked rows of each store, oldest birth first; None where its rows cannot be looked for at once.

    Small tensors cost by their number: ids, births and scores of all stores are put in order together.

    Args:
        stores: one for each batch row.
        layer: index among the layers that carry memory.
        picks: of each store, in any order.
        newest_last: rows of equal birth go by ascending ids; False: by descending ones.
    """
    back: list[Retrieved | None] = [None] * len(stores)
    alike: dict[tuple[int, torch.device], list[int]] = {}
    for place, (store, pick) in enumerate(zip(stores, picks, strict=True)):
        if len(pick.ids) and pick.scores.device == pick.ids.device and not store.layout.extra:
            alike.setdefault((pick.ids.shape[0], pick.ids.device), []).append(place)
    for some in alike.values():
        if len(some) == 1:  # without what it takes to put several side by side
            back[some[0]] = _bring_back_one(stores[some[0]], layer, picks[some[0]], newest_last)
            continue
        ids, by_id = torch.stack([picks[place].ids for place in some]).sort(1, descending=not newest_last)
        scores = torch.stack([picks[place].scores for place in some]).gather(1, by_id)
        found = [stores[place].find(layer, own) for place, own in zip(some, ids, strict=True)]
        known = [(place, one) for place, one in enumerate(found) if one is not None]
        if not known:
            continue
        if len(known) < len(found):
            which = torch.tensor([place for place, _ in known], device=ids.device)
            ids, scores = ids[which], scores[which]
        numbers = [some[place] for place, _ in known]
        made = _in_order([one for _, one in known], ids, scores, [stores[number].layout for number in numbers])
        for number, retrieved in zip(numbers, made, strict=True):
            back[number] = retrieved
    return back


def _in_order(
    found: Sequence[FoundRows], ids: Tensor, scores: Tensor, layouts: Sequence[StoreLayout]
) -> list[Retrieved]:
    """Return the rows ``found`` of several stores, with their ``ids`` and ``scores`` ``[B, n]``, oldest birth first."""
    births = torch.stack([one.take("birth") for one in found])
    sources = torch.stack([one.take("source") for one in found])
    if bool((births[:, 1:] < births[:, :-1]).any()):
        order = births.argsort(dim=1, stable=True)
        ids, scores, births, sources = (column.gather(1, order) for column in (ids, scores, births, sources))
        found = [one.at(own) for one, own in zip(found, order, strict=True)]
    columns = zip(found, layouts, ids, scores, births, sources, strict=True)
    return [_retrieved(*of_store) for of_store in columns]


def _bring_back_one(store: StoreView, layer: int, pick: Selection, newest_last: bool) -> Retrieved | None:
    ids, by_id = pick.ids.sort(descending=not newest_last)
    found = store.find(layer, ids)
    if found is None:
        return None
    scores, births, sources = pick.scores.index_select(0, by_id), found.take("birth"), found.take("source")
    if bool((births[1:] < births[:-1]).any()):
        order = births.argsort(stable=True)
        ids, scores, births, sources = (column.index_select(0, order) for column in (ids, scores, births, sources))
        found = found.at(order)
    return _retrieved(found, store.layout, ids, scores, births, sources)


def _retrieved(
    found: FoundRows, layout: StoreLayout, ids: Tensor, scores: Tensor, births: Tensor, sources: Tensor
) -> Retrieved:
    hidden = found.take("hidden") if layout.keeps_hidden else None
    # Keys and values are copied once, by whoever puts them into place.
    located = found.located("projected") if layout.projected_size else None
    return Retrieved(MemoryRows(hidden, births, sources), ids, scores, located)
