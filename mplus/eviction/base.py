"""EvictionPolicy: which long-term rows leave when a store is over its capacity; and a partial top-k to find them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

import torch
from attrs import define
from torch import Tensor

from mplus.stores.access_log import AccessLog
from mplus.stores.base import Chunk, StoreView, chunk_min


class EvictionPolicy(ABC):
    """Chooses rows to remove; built as ``Policy(options)``.

    Example:
        >>> class NewestFirst(EvictionPolicy):
        ...     name = "newest"
        ...
        ...     def select(self, store, layer, excess):
        ...         return topk_rows(store.chunks(layer, "birth"), excess, lambda chunk: [-chunk.columns["birth"]])
        >>> NewestFirst().select(store, layer=0, excess=2)
        tensor([1, 2])

    Attributes:
        needs_access_log: the policy goes by what is retrieved, so a memory under it notes that (``with_access_log``).
        lifetime: merges that a new row lives; None: rows leave only at capacity and carry no expiry.
    """

    @define(frozen=True, kw_only=True)
    class Options:
        """Options of the implementation (attrs class; the base class has none)."""

    name: ClassVar[str]
    needs_access_log: ClassVar[bool] = False
    lifetime: float | None = None

    def __init__(self, options: EvictionPolicy.Options | None = None) -> None:
        self.options = options if options is not None else self.Options()

    def with_access_log(self, access_log: AccessLog | None) -> EvictionPolicy:
        """Return this policy for the stream that ``access_log`` notes; itself where it does not go by that."""
        return self

    @abstractmethod
    def select(self, store: StoreView, layer: int, excess: int) -> Tensor:
        """Ids of exactly ``excess`` rows of ``layer`` to remove (``[excess]`` int64, ``0 < excess <= count``)."""

    def expire(self, store: StoreView, layer: int, elapsed: float, spare: int) -> tuple[float, Tensor]:
        """Do what a merge does besides adding rows, for policies under which rows have a ``lifetime``.

        Args:
            store: holds the rows that are merged too, each with ``expiry``: its lifetime and what had elapsed then.
            layer: index among the layers that carry memory.
            elapsed: what all rows of the layer have lost of their lifetime since the memory was new.
            spare: rows leave only if more than so many stay; otherwise the merge costs no lifetime.

        Returns:
            What has elapsed now, and the ids of the rows that have expired (``[n]`` int64).
        """
        return elapsed, torch.empty(0, dtype=torch.int64)


class FifoEviction(EvictionPolicy):
    """Oldest birth first (M+ section 3.2: at capacity the rows of the largest age are dropped); ties by lowest id."""

    name = "fifo"

    def select(self, store: StoreView, layer: int, excess: int) -> Tensor:
        """Looks through chunks from the one with the oldest row on, until no other can have a row that must leave."""
        chunks = [chunk for chunk in store.chunks(layer, "birth") if len(chunk.ids)]
        births = ids = torch.empty(0, dtype=torch.int64, device=store.layout.device)
        for chunk in sorted(chunks, key=lambda chunk: chunk_min(chunk, "birth")):
            latest = int(births[-1]) if len(ids) == excess else None
            if latest is not None and chunk_min(chunk, "birth") > latest:
                break  # equal births may yet have lower ids
            old, old_ids = _oldest(chunk, excess, latest)
            births, ids = _in_order(torch.cat([births, old]), torch.cat([ids, old_ids]))
            births, ids = births[:excess], ids[:excess]
        return ids


def _oldest(chunk: Chunk, count: int, latest: int | None) -> tuple[Tensor, Tensor]:
    """Return births and ids of the rows of a chunk that may be among the ``count`` oldest, none born after ``latest``.

    In the order of their ids.
    """
    births = chunk.columns["birth"]
    births = births if chunk.live is None else births.masked_fill(~chunk.live, torch.iinfo(births.dtype).max)
    limit: int | Tensor = births.kthvalue(min(count, len(births))).values if latest is None else latest
    old = births <= limit
    places = (old if chunk.live is None else old & chunk.live).nonzero().squeeze(1)
    return births[places], chunk.ids[places]


def _in_order(births: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Sort the oldest first, ties by lowest id."""
    by_id = ids.argsort()
    order = by_id[births[by_id].argsort(stable=True)]
    return births[order], ids[order]


# ---------------------------------------------------------------------- rows that come first by some keys


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
