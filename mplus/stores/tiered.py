"""TieredStore: all rows in one store, the ones that are read in caches above it, on the host and on the device.

**Where rows are.** A store below (``inner``: files, or memory of the host) has every row. Above it are two tiers, page-
locked memory of the host and memory of the device, each with a budget in bytes that it never exceeds. A tier holds

- *content* (hidden states, keys and values), of which a read needs a few rows: in caches, one per layer. A row comes up
  when it is retrieved, and the least recently retrieved one among its neighbours makes room. New rows take places that
  are free, so that a memory that fits into a tier is never read from below it.
- *small columns* (retriever keys, births, sources), which every read looks at in full: a layer has them in the fastest
  tier that has room for them, within a share of its budget; where neither has, they are read from the store below.

**Writing goes through.** A row is written to the store below at once, so what a tier lets go is never written back, a
crash loses nothing of it, and a memory in a directory keeps its promises. Rows never change under an id, so caches need
no invalidation; forks share the caches of their store, and know by ``Lineage`` which rows they share. A row may be in
both tiers at a time: what the device lets go is then still near.

**Prefetching.** ``locate`` sends rows to a GPU in a stream of their own and returns at once; ``Location.contiguous``
lets the reading stream wait for them. This part was not run on a GPU. On a CPU both tiers are ordinary memory, and the
rest is the same code.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, ClassVar, Self, cast

import attrs
import torch
from attrs import define, evolve, field
from torch import Tensor

from mplus.config import Component, JsonValue, as_component, byte_count, number
from mplus.errors import MemoryMismatchError
from mplus.rows import MemoryRows
from mplus.stores import STORES
from mplus.stores.base import Chunk, Column, Content, Location, MemoryStore, StoreLayout, StoreView
from mplus.stores.tiers.resident import ResidentColumns
from mplus.stores.tiers.shared_cache import Lineage, TierReport, Tiers, content_columns
from mplus.stores.tiers.transfer import CopyEvent, PendingLocation, on_device
from mplus.stores.wrapping import WrappingStore, WrappingView

if TYPE_CHECKING:
    from mplus.stores.slabs.layer import SlabLayer


class _TieredReader(WrappingView):
    """Reads an inner view through tiers."""

    shared: Tiers
    lineage: Lineage
    resident: Sequence[ResidentColumns]

    def ids(self, layer: int) -> Tensor:
        """Return ``[m]`` int64, ascending."""
        small = self._small(layer)
        return (self.inner.ids(layer) if small is None else small.ids).to(self.layout.device)

    def column(self, layer: int, name: Column) -> Tensor | None:
        """Return one column in the order of ``ids``."""
        small = self._small(layer)
        known = small is not None and name in small.layout.columns()
        column = small.column(name) if small is not None and known else self.inner.column(layer, name)
        return None if column is None else column.to(self.layout.device)

    def chunks(self, layer: int, *names: Column | Content) -> Sequence[Chunk]:
        """Return resident columns where they lie; content is read from the store below, and does not come up."""
        small = self._small(layer)
        if small is None or any(name in content_columns(self.layout) for name in names):
            found = self.inner.chunks(layer, *names)
        else:
            found = small.chunks(names)
        return [on_device(chunk, self.layout.device) for chunk in found]

    def gather(self, layer: int, ids: Tensor, leave_out: Collection[Column | Content] = ()) -> MemoryRows:
        """Return copies of the rows with these ids, which come up. Raises KeyError naming a missing one."""
        wanted = [name for name in content_columns(self.layout) if name not in leave_out]
        small = self._found(layer, ids, leave_out)
        columns, places, event = self._content(layer, ids, wanted)
        event.wait(columns.values())
        if places is not None:
            columns = {name: column.index_select(0, places) for name, column in columns.items()}
        return MemoryRows.of({**small.columns(), **columns})

    def locate(self, layer: int, name: Content, ids: Tensor) -> Location | None:
        """Return copies of content that may be on their way yet. Raises KeyError as ``gather``."""
        if name not in content_columns(self.layout):
            return None
        self._found(layer, ids, ("key", "expiry"))
        columns, places, event = self._content(layer, ids, [name])
        if places is None:
            places = torch.arange(len(ids), device=self.layout.device)
        return PendingLocation([(columns[name], places)], event=event)

    def _found(self, layer: int, ids: Tensor, leave_out: Collection[str]) -> MemoryRows:
        """Return resident columns of these rows. Raises KeyError naming one that is not there."""
        small = self._small(layer)
        try:
            if small is not None:
                return small.gather(ids, leave_out).to(self.layout.device)
        except KeyError as error:
            raise KeyError(f"{error.args[0]} in layer {layer}") from None
        unread = cast("list[Column]", [*leave_out, *content_columns(self.layout)])
        return self.inner.gather(layer, ids, unread).to(self.layout.device)

    def _content(
        self, layer: int, ids: Tensor, names: Sequence[str]
    ) -> tuple[dict[str, Tensor], Tensor | None, CopyEvent]:
        """Return the content of rows that are there, and their places in it; None: they are in the order of ``ids``."""
        if not names:
            return {}, None, CopyEvent()
        ids, order = ids.cpu(), None
        # The tiers take each row once, in ascending order.
        if not bool((ids[1:] > ids[:-1]).all()):
            ids, order = ids.unique(return_inverse=True)
        kept = {"birth", "source", *content_columns(self.layout)}  # rows always have the first two
        unread = cast("list[Column]", [name for name in self.layout.columns() if name not in kept])

        def below(places: Tensor) -> dict[str, Tensor]:
            return self.inner.gather(layer, ids[places], unread).columns()

        columns, places, event = self.shared.read(layer, self.lineage.keys(layer, ids), names, below)
        if order is not None:
            places = order if places is None else places[order]
        return columns, None if places is None else places.to(self.layout.device), event

    def _small(self, layer: int) -> SlabLayer | None:
        if not 0 <= layer < self.layout.layers:
            raise IndexError(f"layer must be in 0..{self.layout.layers - 1}, got {layer}")
        return self.resident[layer].of(self.inner, layer)


class TieredView(_TieredReader):
    """The rows of a ``TieredStore`` at one moment."""

    def __init__(self, store: TieredStore) -> None:
        self.layout, self.shared, self.lineage, self.token = store.layout, store.shared, store.lineage, store.token
        self.inner, self.identity, self.resident = store.inner.snapshot(), store.identity, tuple(store.resident)


def _bytes(_: attrs.AttrsInstance, attribute: attrs.Attribute[str], value: JsonValue) -> None:
    if value != 0 or isinstance(value, bool):
        byte_count(value, attribute.name)


class TieredStore(_TieredReader, WrappingStore):
    """Rows in a store below, and those that are read in two tiers above it; see the module.

    A store and all its forks have their tiers, and the budgets of these, together. (Every stream of a memory has a
    store of its own.)
    """

    @define(frozen=True, kw_only=True)
    class Options(MemoryStore.Options):
        """Where all rows are kept, and what the tiers above may take.

        Attributes:
            inner: the store that holds all rows, on the CPU, by name or with options.
            device_bytes: of the device that reads, as a number or "8GiB"; 0: no such tier.
            host_bytes: of the host's memory, page-locked where the device is a GPU; 0: no such tier.
            small_share: part of each budget for columns that every read looks at in full.
        """

        inner: Component = field(default=Component("mmap"), converter=as_component)
        device_bytes: int | str = field(default="1GiB", validator=_bytes)
        host_bytes: int | str = field(default="4GiB", validator=_bytes)
        small_share: float = field(default=0.5, validator=number(0, 1))

    options: Options
    resident: list[ResidentColumns]
    limits: Tensor | None
    """Of a fork without rows of its own: the ids from which on those will be its own, by layer."""
    token: object
    """The same for a store and its snapshots, another for forks."""
    name: ClassVar[str] = "tiered"
    transparent: ClassVar[bool] = True

    def __init__(self, layout: StoreLayout, options: MemoryStore.Options | None = None) -> None:
        MemoryStore.__init__(self, layout, options)
        own = self.options
        device, host = (byte_count(part) if part else 0 for part in (own.device_bytes, own.host_bytes))
        tiers = Tiers(layout, device, host, own.small_share)
        inner = STORES.build(own.inner, evolve(layout, device=torch.device("cpu")))
        resident = [
            ResidentColumns(tiers.allocators) for _ in range(layout.layers)
        ]  # the rows below may yet be read from files
        self._hold(inner, tiers, Lineage.first(layout.layers, tiers.owner()), resident)

    # ------------------------------------------------------------------ changing

    def append(self, layer: int, rows: MemoryRows) -> Tensor:
        """Append ``rows`` to the store below, and in free places above."""
        self.layout.check(rows)
        if self.limits is not None:
            self.lineage, self.limits = self.lineage.forked(self.limits, self.shared.owner()), None
        before = self._unknown(layer)
        ids = self.inner.append(layer, rows.to("cpu"))
        if len(ids):
            kept = self.inner.gather(layer, ids)  # not ``rows``: a store may make something else of them
            self.shared.offer(layer, self.lineage.keys(layer, ids), kept.columns())
            before = before.appended(ids, kept)
        self.resident[layer] = before
        return ids.to(self.layout.device)

    def remove(self, layer: int, ids: Tensor) -> None:
        """Delete the rows with these ids everywhere. Raises KeyError, naming one, when an id is not in the store."""
        before = self._unknown(layer)
        try:
            self.inner.remove(layer, ids.cpu())
        except KeyError:
            self.resident[layer] = before
            raise
        self.resident[layer] = before.removed(ids)
        self.shared.drop(layer, self.lineage.keys(layer, ids.unique()))

    def _unknown(self, layer: int) -> ResidentColumns:
        """Forget small columns until a change is done: whoever interrupts it finds no wrong ones."""
        if not 0 <= layer < self.layout.layers:
            raise IndexError(f"layer must be in 0..{self.layout.layers - 1}, got {layer}")
        before, self.resident[layer] = self.resident[layer], ResidentColumns(self.shared.allocators)
        return before

    # ------------------------------------------------------------------ copies

    def snapshot(self) -> TieredView:
        """Return a view of the present rows, through the same tiers."""
        return TieredView(self)

    def restore(self, snapshot: StoreView) -> None:
        """Go back to a snapshot. Raises MemoryMismatchError when it is not one of this store."""
        if not isinstance(snapshot, TieredView) or snapshot.token is not self.token:
            raise MemoryMismatchError(
                f"restore takes a snapshot of this store, a tiered one of {self.layout}, "
                f"got a {type(snapshot).__name__} of {getattr(snapshot, 'layout', None)}"
            )
        # Nothing is resident until the store below is back: an interrupt in between would leave columns of other rows.
        self.resident = [ResidentColumns(self.shared.allocators) for _ in self.resident]
        self.inner.restore(snapshot.inner)
        self.resident = list(snapshot.resident)

    def fork(self) -> Self:
        """Return a store around a fork of the inner one, in the same tiers."""
        ids = [self.ids(layer)[-1:].cpu() for layer in range(self.layout.layers)]
        fork = self._around(self.layout, self.inner.fork(), self.shared, self.lineage, list(self.resident))
        # A number of its own is for a fork that is written: many are only read.
        fork.limits = torch.tensor([int(last) + 1 if len(last) else 0 for last in ids])
        return fork

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Return the same rows and ids for another device or in another dtype, with tiers of their own."""
        layout = self.layout.to(device, dtype)
        if layout == self.layout:
            return self.fork()
        own = self.shared
        tiers = Tiers(layout, own.device.budget, own.host.budget, self.options.small_share)
        lineage = Lineage.first(layout.layers, tiers.owner())
        resident = [ResidentColumns(tiers.allocators) for _ in self.resident]
        return self._around(layout, self.inner.to(dtype=dtype), tiers, lineage, resident)

    # ------------------------------------------------------------------ sizes

    def tiers(self) -> list[TierReport]:
        """Report on each tier, the fastest first, the store below last. Forks have their tiers together."""
        small = dict.fromkeys(self.shared.allocators, 0)
        below = 0
        for layer, part in enumerate(self.resident):
            if part.allocator is None:
                below += self.count(layer)
            else:
                small[part.allocator] += self.count(layer)
        last = TierReport(
            name=self.inner.name,
            budget=None,
            nbytes=self.inner.nbytes,
            rows=sum(map(self.count, range(self.layout.layers))),
            small_rows=below,
            hits=self.shared.below_hits,
        )
        return [*self.shared.reports(small), last]

    @property
    def nbytes(self) -> int:
        """Bytes of the store below and of both tiers."""
        return self.inner.nbytes + self.shared.nbytes

    def _around(
        self, layout: StoreLayout, inner: MemoryStore, tiers: Tiers, lineage: Lineage, resident: list[ResidentColumns]
    ) -> Self:
        store = object.__new__(type(self))
        MemoryStore.__init__(store, layout, self.options)
        store._hold(inner, tiers, lineage, resident)
        return store

    def _hold(self, inner: MemoryStore, tiers: Tiers, lineage: Lineage, resident: list[ResidentColumns]) -> None:
        self.inner, self.identity = inner, inner.identity
        self.shared, self.lineage, self.resident = tiers, lineage, resident
        self.limits, self.token = None, object()
