"""WrappingStore: a store whose rows lie in another one, ``inner``, which a configuration names."""

from __future__ import annotations

from typing import ClassVar

from mplus.stores.base import MemoryStore, StoreView


class WrappingView(StoreView):
    """The reading side: ids, counts and revisions are those of the inner view."""

    inner: StoreView

    def count(self, layer: int) -> int:
        """Return the number of rows of ``layer``."""
        return self.inner.count(layer)

    def revision(self, layer: int) -> int | None:
        """Return how often ``layer`` had changed, as the inner store counts it."""
        return self.inner.revision(layer)


class WrappingStore(WrappingView, MemoryStore):
    """The writing side: sizes and files are those of the inner store. A subclass says what reads and appends do."""

    inner: MemoryStore
    name: ClassVar[str]

    @property
    def bytes_per_row(self) -> int:
        """Bytes of a row of one layer in the inner store, its id included."""
        return self.inner.bytes_per_row

    def bytes_for(self, rows: int) -> int:
        """Return the bytes of a layer of at most ``rows`` rows in the inner store."""
        return self.inner.bytes_for(rows)

    def set_capacity(self, rows: int) -> None:
        """Set the capacity of the inner store."""
        self.inner.set_capacity(rows)

    @property
    def nbytes(self) -> int:
        """Bytes of the inner store."""
        return self.inner.nbytes

    def close(self) -> None:
        """Close the inner store."""
        self.inner.close()
