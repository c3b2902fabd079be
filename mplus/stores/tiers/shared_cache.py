"""Tiers: the caches above a store, which it and its forks share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import count

import torch
from attrs import define, evolve
from torch import Tensor

from mplus.stores.base import StoreLayout, ordinary_tensors
from mplus.stores.tiers.cache import RowCache
from mplus.stores.tiers.resident import BudgetedAllocator
from mplus.stores.tiers.transfer import CopyEvent, Transfer

Columns = Mapping[str, Tensor]
OWNER_BITS = 40
"""A key is the number of a store, and an id below this power of two."""


def content_columns(layout: StoreLayout) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return the columns that are read row by row: hidden states, keys and values, and what a coding adds."""
    columns = layout.columns()
    return {name: columns[name] for name in columns if name.startswith(("hidden", "projected"))}


@define(frozen=True, kw_only=True)
class TierReport:
    """A report on one tier.

    Attributes:
        name: "device", "host", or the name of the store below, which has everything.
        budget: bytes it may take; None: no limit.
        nbytes: bytes it takes.
        rows: rows whose content it has, all layers together.
        small_rows: rows whose small columns (keys, births, sources) are read from here.
        hits: rows of content that reads found here, and in no tier above, since the store was made.
    """

    name: str
    budget: int | None
    nbytes: int
    rows: int
    small_rows: int
    hits: int


class Tier:
    """One cache per layer, and room for small columns, within a budget in bytes."""

    def __init__(
        self, name: str, layout: StoreLayout, device: torch.device, budget: int, small: float, *, pinned: bool
    ) -> None:
        self.name, self.budget, self.hits = name, budget, 0
        extra = tuple(part for part in layout.extra if part[0] not in content_columns(layout))
        resident = evolve(layout, keeps_hidden=False, projected_size=0, extra=extra, device=device)
        self.allocator = BudgetedAllocator(resident, int(budget * small), pinned=pinned)
        each = (budget - self.allocator.budget) // layout.layers
        self.caches = [RowCache(content_columns(layout), each, device, pinned=pinned) for _ in range(layout.layers)]

    @property
    def nbytes(self) -> int:
        """Bytes of all places and blocks."""
        return self.allocator.nbytes + sum(cache.nbytes for cache in self.caches)


class Tiers:
    """Device above host above a store that has all rows. Rows that are read come up; nothing has to go down."""

    def __init__(self, layout: StoreLayout, device_bytes: int, host_bytes: int, small: float) -> None:
        self.transfer = Transfer(layout.device)
        host = torch.device("cpu")
        self.device = Tier("device", layout, layout.device, device_bytes, small, pinned=False)
        self.host = Tier("host", layout, host, host_bytes, small, pinned=self.transfer.pinned)
        self.below_hits = 0
        self._names = content_columns(layout)
        self._owners = count()

    def owner(self) -> int:
        """Return a number for one more store."""
        return next(self._owners)

    @property
    def allocators(self) -> Sequence[BudgetedAllocator]:
        """For small columns, the fastest first."""
        return self.device.allocator, self.host.allocator

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.device.nbytes + self.host.nbytes

    def read(
        self, layer: int, keys: Tensor, names: Sequence[str], below: Callable[[Tensor], Columns]
    ) -> tuple[dict[str, Tensor], Tensor | None, CopyEvent]:
        """Return the columns of the rows with ``keys`` ``[n]`` (none twice), on the device or on their way there.

        Args:
            layer: index among the layers that carry memory.
            keys: on the CPU.
            names: of content columns.
            below: gives all content columns of the rows at some of the places ``0 .. n-1``, from the store below.

        Returns:
            Columns ``[n, ...]``; ``[n]`` int64, for each key the place of its row there, None: they are in the order
            of ``keys``; and when they are there.
        """
        count, cache = len(keys), self.device.caches[layer]
        with ordinary_tensors(), self.transfer.on_stream():
            found = {name: self._empty(name, count, self.transfer.device) for name in names}
            with cache.lock:
                # Copied before the lock is given back: another read may put other rows in these places.
                here, rest = _take(cache, keys, found, self.transfer.device)
            self.device.hits += len(here)
            if len(rest):
                # On a CPU the lower rows are put where they are wanted at once.
                lower = {
                    name: found[name][len(here) :]
                    if name in found and not self.transfer.pinned
                    else self._empty(name, len(rest), torch.device("cpu"))
                    for name in self._names
                }
                # In the order in which they come: rows of the host's tier, and behind them those from below.
                rest = rest[self._from_host(layer, keys[rest], lower, lambda some: below(rest[some]))]
                sent = {name: self.transfer.to_device(column) for name, column in lower.items()}
                for name in names if self.transfer.pinned else ():
                    found[name][len(here) :].copy_(sent[name])
                with cache.lock:
                    cache.put(keys[rest], sent)
            order = torch.cat([here, rest])
            sorted_already = bool((order == torch.arange(count)).all())
            return found, None if sorted_already else order.argsort(), self.transfer.event()

    def _from_host(self, layer: int, keys: Tensor, into: Columns, below: Callable[[Tensor], Columns]) -> Tensor:
        """Fill columns on the host; returns in which order the rows with ``keys`` are there."""
        cache = self.host.caches[layer]
        with cache.lock:
            here, rest = _take(cache, keys, into, torch.device("cpu"))
        self.host.hits += len(here)
        if len(rest):
            own = {name: column[len(here) :] for name, column in into.items()}
            given = below(rest)
            self.below_hits += len(rest)
            for name, column in own.items():
                column.copy_(given[name])
            with cache.lock:
                cache.put(keys[rest], own)
        return torch.cat([here, rest])

    def _empty(self, name: str, count: int, device: torch.device) -> Tensor:
        shape, dtype = self._names[name]
        return torch.empty(
            count, *shape, dtype=dtype, device=device, pin_memory=self.transfer.pinned and device.type == "cpu"
        )

    def offer(self, layer: int, keys: Tensor, columns: Columns) -> None:
        """Offer new rows, on the host, to places that nobody has; what reads brought up stays."""
        own = {name: columns[name] for name in self._names}
        host, device = self.host.caches[layer], self.device.caches[layer]
        with ordinary_tensors():
            with host.lock:
                host.put(keys, own, displace=False)
            with self.transfer.on_stream(), device.lock:
                if not device.full:  # else the rows would be sent to a device that has no place for them
                    device.put(keys, {name: self.transfer.to_device(own[name]) for name in own}, displace=False)

    def drop(self, layer: int, keys: Tensor) -> None:
        """Let rows go that were removed."""
        for tier in (self.device, self.host):
            with tier.caches[layer].lock:
                tier.caches[layer].drop(keys)

    def reports(self, small_rows: Mapping[BudgetedAllocator, int]) -> list[TierReport]:
        """Report on both tiers; ``small_rows``: by room."""
        return [
            TierReport(
                name=tier.name,
                budget=tier.budget,
                nbytes=tier.nbytes,
                rows=sum(cache.rows for cache in tier.caches),
                small_rows=small_rows.get(tier.allocator, 0),
                hits=tier.hits,
            )
            for tier in (self.device, self.host)
        ]


def _take(cache: RowCache, keys: Tensor, into: Columns, device: torch.device) -> tuple[Tensor, Tensor]:
    """Copy the rows that a cache has to the beginning of columns; which of ``keys`` these are, and which are left."""
    places = cache.find(keys)
    found = (places >= 0).nonzero().squeeze(1)
    start, order = 0, [found[:0]]
    for columns, which, at in cache.parts(places[found]):
        index = at.to(device, non_blocking=True)
        for name, column in into.items():
            torch.index_select(columns[name], 0, index, out=column[start : start + len(at)])
        start += len(at)
        order.append(found[which])
    return torch.cat(order), (places < 0).nonzero().squeeze(1)


@define(frozen=True, eq=False)
class Lineage:
    """Which store of a family gave an id: forks go on with the same ids for other rows.

    Attributes:
        owners: ``[k]`` int64, stores from the first one to this.
        limits: ``[layers, k - 1]`` int64, per layer the ids from which on each store but the first gave them.
    """

    owners: Tensor
    limits: Tensor

    @staticmethod
    def first(layers: int, owner: int) -> Lineage:
        """Return the lineage of a store that is no fork."""
        return Lineage(torch.tensor([owner]), torch.empty(layers, 0, dtype=torch.int64))

    def forked(self, limits: Tensor, owner: int) -> Lineage:
        """Return the lineage of a fork, whose own rows have ids from ``limits`` ``[layers]`` on."""
        return Lineage(torch.cat([self.owners, torch.tensor([owner])]), torch.cat([self.limits, limits[:, None]], 1))

    def keys(self, layer: int, ids: Tensor) -> Tensor:
        """Return ``[n]`` keys in the caches of the rows with these ids ``[n]``, on the CPU."""
        ids = ids.cpu()
        # Rows from before a fork are known under the store that wrote them, so that forks share them.
        who = torch.searchsorted(self.limits[layer], ids, right=True)
        return (self.owners[who] << OWNER_BITS) | ids
