"""Block: preallocated columns that rows are written into once; Allocator: where blocks come from."""

from __future__ import annotations

import ctypes
import weakref
from abc import ABC, abstractmethod
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mplus.stores.base import ordinary_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mplus.stores.base import StoreLayout


TURNED = 256
"""Rows at a time that are copied to where they lie transposed."""
KEPT_BYTES = 2**20
"""Columns below this size are left to the system's allocator, which keeps small pieces of memory itself."""


class Block:
    """Preallocated columns of equal capacity, the ids among them. A place is written once and never changes.

    Attributes:
        columns: name -> ``[capacity, ...]``; those of ``block_columns``. Keys may lie transposed in memory.
        capacity: rows there is room for.
        home: the allocator it came from; a layer writes only into blocks of its own allocator.
    """

    def __init__(self, columns: Mapping[str, Tensor], *, home: Allocator | None = None, taken: int = 0) -> None:
        """``taken``: places ``0 .. taken-1`` hold rows already."""
        self.columns = dict(columns)
        self.capacity = columns["id"].shape[0]
        self.home = home
        self._tip = taken
        self._claims: dict[int, object] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all columns, unused places included."""
        return sum(column.numel() * column.element_size() for column in self.columns.values())

    def claim(self, start: int, most: int) -> int:
        """Reserve up to ``most`` places from ``start`` on for the caller: as many as there are, 0 if one is taken."""
        # No lock, which an interrupt could leave locked: of those who claim a place at once, one finds its own mark.
        mark = object()
        if start != self._tip or self._claims.setdefault(start, mark) is not mark:
            return 0
        granted = min(most, self.capacity - start)
        self._tip = start + granted
        return granted

    def write(self, start: int, columns: Mapping[str, Tensor], index: Tensor | None = None) -> None:
        """Copy rows (those at ``index``, or all) into places that the caller has claimed, without their history."""
        with ordinary_tensors():
            for name, source in columns.items():
                rows = source.shape[0] if index is None else index.shape[0]
                # Through .data: places that others look at stay as they are, so autograd need not hear of this.
                target = self.columns[name].data[start : start + rows]
                _copy(target, source, index)


class Allocator(ABC):
    """Gives the blocks of one layer of a store and of its forks.

    Nothing gives a block back: it is free when no slab, snapshot, fork or tensor that was handed out refers to it any
    more. An allocator that reuses memory or removes files learns of that from a ``weakref.finalize`` on the block
    (slabs, snapshots and forks) or on what owns the storage of its columns (tensors handed out, too).
    """

    @abstractmethod
    def allocate(self, rows: int) -> Block:
        """Return an empty block with room for ``rows`` rows (at least 1) whose ``home`` is this allocator."""

    @property
    def spare_bytes(self) -> int:
        """Bytes that are kept for later blocks."""
        return 0

    def release_spare(self) -> None:  # noqa: B027 - most keep nothing
        """Keep no memory for later blocks from now on."""


class RamAllocator(Allocator):
    """Blocks in memory. On a CPU, large columns that nobody looks at any more are kept for later blocks of that size.

    What is kept takes at most half as much as such columns in use. Other devices have a free list of torch's.

    Attributes:
        layout: what the rows look like.
    """

    def __init__(self, layout: StoreLayout, keeps: bool = True) -> None:
        self.layout = layout
        self._keeps = keeps
        self._lent: dict[int, int] = {}  # number -> bytes
        self._spare: dict[int, Tensor] = {}  # number -> memory
        self._numbers = count()

    def allocate(self, rows: int) -> Block:
        """Return an empty block with room for ``rows`` rows (at least 1) whose ``home`` is this allocator."""
        with ordinary_tensors():
            columns = {
                name: self._column(name, rows, shape, dtype)
                for name, (shape, dtype) in block_columns(self.layout).items()
            }
        return Block(columns, home=self)

    def release_spare(self) -> None:
        self._keeps = False
        self._spare.clear()

    @property
    def spare_bytes(self) -> int:
        return sum(memory.shape[0] for memory in list(self._spare.values()))

    def _column(self, name: str, rows: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if name != "key" or not self.layout.transposed_keys or self.layout.device.type != "cpu":
            return self._empty((rows, *shape), dtype)
        return self._empty((*shape, rows), dtype).T

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        if self.layout.device.type != "cpu" or size < KEPT_BYTES:
            return torch.empty(shape, dtype=dtype, device=self.layout.device)
        memory = self._reused(size)
        # The storage of what is handed out holds on to this object, and so do all views of it: when the object goes,
        # nobody looks at the memory any more.
        owner = (ctypes.c_char * size).from_address(memory.data_ptr())
        number = next(self._numbers)
        self._lent[number] = size
        weakref.finalize(owner, self._back, number, memory).atexit = False
        return torch.frombuffer(owner, dtype=torch.uint8).view(dtype).view(shape)

    # The garbage collector may call ``_back`` at any moment and in any thread, in the middle of the others too: each
    # step here is one that the interpreter does not divide, and there is no lock to wait for.

    def _reused(self, size: int) -> Tensor:
        for number, memory in list(self._spare.items()):
            if memory.shape[0] == size and self._spare.pop(number, None) is not None:
                return memory
        return torch.empty(size, dtype=torch.uint8)

    def _back(self, number: int, memory: Tensor) -> None:
        self._lent.pop(number, None)
        if not self._keeps:
            return
        self._spare[number] = memory
        for oldest in list(self._spare):
            if self.spare_bytes <= sum(list(self._lent.values())) // 2:
                break
            self._spare.pop(oldest, None)

    def __getstate__(self) -> dict[str, Any]:
        return {"layout": self.layout, "keeps": self._keeps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def _copy(target: Tensor, source: Tensor, index: Tensor | None) -> None:
    """Copy the rows of ``source`` at ``index``, or all of them, to ``target`` ``[n, ...]``."""
    if _is_transposed(target) and not _is_transposed(source):
        rows = source if index is None else source.index_select(0, index)
        # So few at a time stay in the cache while they are turned round, which is ten times as fast as all at once.
        for own, given in zip(target.split(TURNED), rows.split(TURNED), strict=True):
            own.copy_(given)
    elif index is None:
        target.copy_(source)
    elif source.dtype != target.dtype or source.device != target.device:
        target.copy_(source.index_select(0, index))
    elif _is_transposed(target):
        torch.gather(source.T, 1, index.expand(target.shape[1], -1), out=target.T)
    else:
        torch.index_select(source, 0, index, out=target)


def _is_transposed(column: Tensor) -> bool:
    return column.dim() == 2 and column.stride(0) == 1 < column.stride(1)


def block_columns(layout: StoreLayout) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return the shape of one row and dtype of every column of a block: those of the layout, and ``id``."""
    return {"id": ((), torch.int64), **layout.columns()}
