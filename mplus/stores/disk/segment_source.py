"""What holds the columns of consecutive rows of one layer: a growing buffer in memory, or a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from mplus.stores.base import ordinary_tensors
from mplus.stores.disk.block_file import BlockFile
from mplus.stores.disk.locks import ProcessLock
from mplus.stores.disk.verified import VerifiedTensor

if TYPE_CHECKING:
    from mplus.stores.base import StoreLayout


class SegmentSource(Protocol):
    """Columns by name, ``id`` among them. A place that was read never changes."""

    @property
    def nbytes(self) -> int:
        """Bytes of all places."""

    @property
    def in_memory(self) -> bool:
        """True if they take up memory of the process."""

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return ``[stop - start, ...]``, where it lies."""

    def take(self, name: str, places: Tensor) -> Tensor:
        """Return ``[n, ...]``, copies of what stands at ``places``."""

    def around(self, name: str, places: Tensor) -> Tensor:
        """Return a whole column where it lies, of which only what stands at ``places`` may be read."""

    def column(self, name: str) -> VerifiedTensor | Tensor:
        """Return a whole column, for ``mplus.stores.disk.verified.take``."""


class Buffer:
    """Preallocated columns in memory; many runs of rows share one, and whoever comes first writes on behind them."""

    in_memory = True

    def __init__(self, layout: StoreLayout, capacity: int) -> None:
        with ordinary_tensors():
            self.columns = {
                name: torch.empty(capacity, *shape, dtype=dtype)
                for name, (shape, dtype) in {"id": ((), torch.int64), **layout.columns()}.items()
            }
        self.capacity = capacity
        self._tip = 0
        self._lock = ProcessLock()

    @property
    def nbytes(self) -> int:
        """Bytes of all columns, unused places included."""
        return sum(column.nbytes for column in self.columns.values())

    def claim(self, start: int, count: int) -> bool:
        """Reserve the places ``start .. start+count-1`` for the caller, unless anything from ``start`` on is taken."""
        with self._lock.here():
            if start != self._tip or start + count > self.capacity:
                return False
            self._tip = start + count
            return True

    def write(self, start: int, columns: Mapping[str, Tensor]) -> None:
        """Copy rows into places that the caller has claimed, without their history."""
        with ordinary_tensors():
            for name, source in columns.items():
                # Through .data: places that others look at stay as they are, so autograd need not hear of this.
                self.columns[name].data[start : start + source.shape[0]].copy_(source)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return self.columns[name][start:stop]

    def take(self, name: str, places: Tensor) -> Tensor:
        return self.columns[name].index_select(0, places)

    def around(self, name: str, places: Tensor) -> Tensor:
        return self.columns[name]

    def column(self, name: str) -> Tensor:
        return self.columns[name]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=ProcessLock())


class FileLayer:
    """One layer of a block file, whose tensors are called ``<layer>.<column>``."""

    in_memory = False

    def __init__(self, file: BlockFile, layer: int) -> None:
        self.file = file
        self.layer = layer

    @property
    def nbytes(self) -> int:
        """Bytes of the layer's columns."""
        mark = f"{self.layer}."
        spans = [span for name, span in self.file.spans.items() if name.startswith(mark)]
        return sum(span.end - span.begin for span in spans)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return self.column(name).read(start, stop)

    def take(self, name: str, places: Tensor) -> Tensor:
        return self.column(name).take(places)

    def around(self, name: str, places: Tensor) -> Tensor:
        tensor = self.column(name)
        tensor.check(places)
        return tensor.rows

    def column(self, name: str) -> VerifiedTensor:
        return self.file.tensor(f"{self.layer}.{name}")
