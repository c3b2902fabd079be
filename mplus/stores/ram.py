"""RamStore: long-term rows in memory, on the CPU or on a device; SlabStore: the same, wherever blocks come from."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from attrs import define, evolve, field
from torch import Tensor

from mplus.config import is_number, must_be, whole
from mplus.errors import MemoryMismatchError
from mplus.rows import MemoryRows
from mplus.stores.base import Chunk, Column, Content, Identity, MemoryStore, StoreLayout, StoreView
from mplus.stores.layered import LayeredView, naming_layer
from mplus.stores.slabs.block import Allocator, RamAllocator
from mplus.stores.slabs.layer import SlabLayer
from mplus.stores.slabs.slab import SlabSizes, places_for


class _SlabReader(LayeredView[SlabLayer]):
    """Reads one ``SlabLayer`` per layer.

    Attributes:
        slab_layers: of the present moment; the slabs of each say where its rows lie.
    """

    slab_layers: Sequence[SlabLayer]

    @property
    def values(self) -> Sequence[SlabLayer]:
        """The layers as they are at this moment."""
        return self.slab_layers

    def content(self, layer: int, name: Content) -> Tensor | None:
        """Return a column of content, where the rows lie together."""
        return self._layer(layer).content(name)

    def revision(self, layer: int) -> int:
        """Return the number of changes to the layer, counted from 0."""
        return self._layer(layer).revision

    def chunks(self, layer: int, *names: Column | Content) -> list[Chunk]:
        """Return a chunk for every slab, without a copy."""
        return self._layer(layer).chunks(names)


class SlabView(_SlabReader):
    """The rows of a ``SlabStore`` at one moment."""

    def __init__(self, layout: StoreLayout, slab_layers: Sequence[SlabLayer], identity: Identity | None) -> None:
        self.layout = layout
        self.slab_layers = slab_layers
        self.identity = identity


class SlabStore(_SlabReader, MemoryStore):
    """Rows in slabs of preallocated blocks.

    Appending and removing cost what they touch; snapshots, forks and restores share slabs, and copy none. Forks may
    be used from different threads; one store must not be changed by two threads at a time, but its snapshots may be
    read meanwhile.

    A subclass says where blocks come from (``allocator``) and how large they are (``sizes``).
    """

    def __init__(self, layout: StoreLayout, options: MemoryStore.Options | None = None) -> None:
        MemoryStore.__init__(self, layout, options)
        sizes = self.sizes
        self.slab_layers: list[SlabLayer] = [
            SlabLayer(layout, sizes, self.allocator(layout, layer)) for layer in range(layout.layers)
        ]

    @abstractmethod
    def allocator(self, layout: StoreLayout, layer: int) -> Allocator:
        """Return a new source of blocks for one layer, of a store with this layout."""

    @property
    @abstractmethod
    def sizes(self) -> SlabSizes:
        """The sizes of blocks."""

    def append(self, layer: int, rows: MemoryRows) -> Tensor:
        """Copy ``rows`` in, cut off from their autograd history."""
        before = self._layer(layer)
        after = before.append(rows)
        self.slab_layers[layer] = after
        return torch.arange(before.next_id, after.next_id, device=self.layout.device)

    def remove(self, layer: int, ids: Tensor) -> None:
        """Delete rows: new masks for the slabs that hold them, and now and then a slab is rewritten without them."""
        with naming_layer(layer):
            self.slab_layers[layer] = self._layer(layer).remove(ids)

    def snapshot(self) -> SlabView:
        """Return a view of the present rows; it keeps their blocks alive."""
        return SlabView(self.layout, tuple(self.slab_layers), self.identity)

    def restore(self, snapshot: StoreView) -> None:
        """Go back to a snapshot. Raises MemoryMismatchError when it is of another kind of store or layout."""
        if not isinstance(snapshot, SlabView) or snapshot.layout != self.layout:
            raise MemoryMismatchError(
                f"restore takes a snapshot of this store, a {type(self).__name__} ({self.layout}), "
                f"got a {type(snapshot).__name__} ({getattr(snapshot, 'layout', None)})"
            )
        pairs = zip(snapshot.slab_layers, self.slab_layers, strict=True)
        self.slab_layers = [
            # An id is given once, be its row taken back: caches know rows by it. The revision goes on, so that indexes
            # see a change.
            evolve(then, next_id=max(then.next_id, now.next_id), revision=now.revision + 1)
            for then, now in pairs
        ]

    def fork(self) -> Self:
        """Return a store that shares this one's slabs."""
        return self._with(self.layout, list(self.slab_layers))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Return the same rows and ids elsewhere; a fork when neither device nor dtype changes."""
        layout = self.layout.to(device, dtype)
        if layout == self.layout:
            return self.fork()
        moved = [layer.to(layout, self.allocator(layout, index)) for index, layer in enumerate(self.slab_layers)]
        return self._with(layout, moved)

    def bytes_for(self, rows: int) -> int:
        """Return the bytes of a place for each row, and an eighth as many for blocks that are not full."""
        return places_for(rows) * self.bytes_per_row

    def set_capacity(self, rows: int) -> None:
        """Make blocks that are small beside ``rows``, and keep none that nobody uses."""
        sizes = self.sizes.for_capacity(rows)
        for layer in self.slab_layers:
            layer.allocator.release_spare()
        self.slab_layers = [evolve(layer, sizes=sizes).compacted() for layer in self.slab_layers]

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks, and of what is kept for later ones; forks that share some count them each."""
        return sum(layer.nbytes for layer in self.slab_layers)

    def _with(self, layout: StoreLayout, slab_layers: list[SlabLayer]) -> Self:
        store = type(self)(layout, self.options)
        store.slab_layers = slab_layers
        return store


class RamStore(SlabStore):
    """Rows in memory; see ``SlabStore``."""

    @define(frozen=True, kw_only=True)
    class Options(MemoryStore.Options):
        """Room that is kept.

        Attributes:
            growth: factor by which a layer's room grows, up to ``slab_rows`` at a time. A layer takes at most the
                square of this many times the room of its rows (and ``slab_rows / 16`` more where it is large).
            slab_rows: rows of a block, at most.
            expected_rows: rows a layer is expected to hold: the first block of each has room for them, up to
                ``slab_rows``. 0: room grows with what is written.
        """

        growth: float = field(
            default=2.0,
            validator=must_be(
                "a finite number above 1", lambda value: is_number(value, 1) and value not in (1, float("inf"))
            ),
        )
        slab_rows: int = field(default=16384, validator=whole(1))
        expected_rows: int = field(default=0, validator=whole(0))

    options: Options
    name: ClassVar[str] = "ram"

    @property
    def sizes(self) -> SlabSizes:
        """The sizes that the options say."""
        return SlabSizes(self.options.growth, self.options.slab_rows, self.options.expected_rows)

    def allocator(self, layout: StoreLayout, layer: int) -> Allocator:
        """Return blocks in memory, on the device of ``layout``."""
        return RamAllocator(layout)
