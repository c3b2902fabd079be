"""MmapStore: long-term rows in files that are mapped into memory; the system's page cache is the tier between."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from attrs import define, field
from torch import Tensor

from mplus.config import whole
from mplus.errors import ConfigError, MemoryMismatchError, NotSupported
from mplus.rows import MemoryRows
from mplus.stores.base import Chunk, Column, Content, Identity, MemoryStore, StoreLayout, StoreView, parts_of
from mplus.stores.disk.block_file import BlockFile
from mplus.stores.disk.compaction import compact, plan_compaction
from mplus.stores.disk.files import FileSystem
from mplus.stores.disk.locks import ProcessLock
from mplus.stores.disk.segments import SegmentedRows, segment_sources
from mplus.stores.layered import LayeredView, naming_layer


class _SegmentReader(LayeredView[SegmentedRows]):
    """Reads one ``SegmentedRows`` per layer."""

    def __init__(self, layout: StoreLayout, layers: Sequence[SegmentedRows]) -> None:
        self.layout = layout
        self.layers: tuple[SegmentedRows, ...] = tuple(layers)

    @property
    def values(self) -> Sequence[SegmentedRows]:
        """The layers as they are at this moment."""
        return self.layers

    def content(self, layer: int, name: Content) -> Tensor | None:
        """Return a column in the order of ``ids`` where its rows lie together in memory; None elsewhere.

        In a file they would all have to be checked: ``locate`` and ``gather`` check those that are wanted.
        """
        segments = self._layer(layer).segments
        together = len(segments) == 1 and segments[0].live is None and segments[0].source.in_memory
        return segments[0].read(name) if together and name in self.layout.columns() else None

    def chunks(self, layer: int, *names: Column | Content) -> Sequence[Chunk]:
        """Return the segments of rows as they lie in files and in memory, without a copy."""
        present = [name for name in names if name in self.layout.columns()]
        return [
            Chunk(
                segment.ids,
                segment.live,
                {name: segment.read(name) for name in present},
                inherited_cache=segment.inherited_cache,
            )
            for segment in self._layer(layer).segments
        ]


class MmapView(_SegmentReader):
    """The rows of an ``MmapStore`` at one moment."""

    def __init__(self, layout: StoreLayout, layers: Sequence[SegmentedRows], identity: Identity | None) -> None:
        super().__init__(layout, layers)
        self.identity = identity


@define(frozen=True, eq=False)
class Change:
    """``rows`` were appended to a layer under ``ids``, or, where ``rows`` is None, those with ``ids`` removed."""

    layer: int
    ids: Tensor
    rows: MemoryRows | None


class MmapStore(_SegmentReader, MemoryStore):
    """Rows in files that never change, the newest ones in memory until they are many enough for a file.

    The store is made of sorted segments, as in a log-structured merge tree. Appending costs what it adds and,
    amortised, a few rewritings of each row while it is young; removing marks rows, and a file of which less than half
    is left is rewritten with the next one. Forks, snapshots and restores copy nothing. Rows are kept on the CPU.

    By itself the store is **scratch space**: its files go when the store and all its forks and snapshots have gone. A
    memory that lasts is made by ``Memory.open``, whose directory keeps such files, or by ``Memory.save``.

    Forks may be used from different threads; one store must not be changed by two threads at a time, but its snapshots
    may be read meanwhile.
    """

    @define(frozen=True, kw_only=True)
    class Options(MemoryStore.Options):
        """Where rows are kept, and how many in memory.

        Attributes:
            directory: the files go there; it is made where it does not exist. None: a temporary one.
            bytes_in_memory: rows are moved to a file when those in memory take more than this, all layers together.
        """

        directory: str | None = None
        bytes_in_memory: int = field(default=2**26, validator=whole(1))

    options: Options
    name: ClassVar[str] = "mmap"

    def __init__(self, layout: StoreLayout, options: MemoryStore.Options | None = None) -> None:
        if layout.device.type != "cpu":
            raise NotSupported(
                f"the store 'mmap' keeps rows on the CPU, got device {layout.device}: make the memory with "
                "device='cpu', use the store 'ram', or read these through the store 'tiered'"
            )
        MemoryStore.__init__(self, layout, options)
        _SegmentReader.__init__(self, layout, [SegmentedRows(layout) for _ in range(layout.layers)])
        self.next_ids = [0] * layout.layers
        self.changes: list[Change] | None = None
        """Not None: somebody keeps this store in a directory, moves its rows to files, and is told what is done."""
        self.scratch = Scratch(self.options.directory)

    # ------------------------------------------------------------------ changing

    def append(self, layer: int, rows: MemoryRows) -> Tensor:
        """Copy ``rows`` in, cut off from their autograd history."""
        first = self.next_ids[layer] if 0 <= layer < self.layout.layers else 0
        ids = torch.arange(first, first + len(rows))
        self.append_as(layer, ids, rows)
        return ids

    def append_as(self, layer: int, ids: Tensor, rows: MemoryRows) -> None:
        """Append rows under given ids (``[n]`` int64, ascending, above all that were ever given in this layer)."""
        segments = self._layer(layer)
        self.layout.check(rows)
        if not len(rows):
            return
        grown = segments.append(ids, rows)  # an immutable value: what reads look at does not change
        self.next_ids[layer] = int(ids[-1]) + 1  # before the rows show: an interrupt here leaves a gap, and no harm
        self.layers = (*self.layers[:layer], grown, *self.layers[layer + 1 :])
        if self.changes is not None:
            self.changes.append(Change(layer, ids, rows))
        elif self.bytes_in_memory > self.options.bytes_in_memory:
            self._spill()

    def remove(self, layer: int, ids: Tensor) -> None:
        """Mark rows as removed."""
        with naming_layer(layer):
            left = self._layer(layer).remove(ids.cpu())
        self.layers = (*self.layers[:layer], left, *self.layers[layer + 1 :])
        if self.changes is not None and len(ids):
            self.changes.append(Change(layer, ids, None))

    @property
    def bytes_in_memory(self) -> int:
        """Bytes of the rows that are not in files."""
        return sum(segments.bytes_in_memory for segments in self.layers)

    def _spill(self) -> None:
        """Move the rows in memory to a file."""
        for group in plan_compaction(self.layers):
            path = self.scratch.path()
            # Not synced: scratch files are of no use after a crash.
            self.layers = compact(self.layers, group, FileSystem(), path, sync=False)[0]
            _remove_with(self.layers, path)

    # ------------------------------------------------------------------ copies

    def snapshot(self) -> MmapView:
        """Return a view of the present rows; it keeps what holds them alive."""
        return MmapView(self.layout, self.layers, self.identity)

    def restore(self, snapshot: StoreView) -> None:
        """Go back to a snapshot. Raises MemoryMismatchError when it is of another kind of store or layout."""
        if not isinstance(snapshot, MmapView) or snapshot.layout != self.layout:
            raise MemoryMismatchError(
                f"restore takes a snapshot of this store ({self.layout}), "
                f"got a {type(snapshot).__name__} ({getattr(snapshot, 'layout', None)})"
            )
        self.layers = snapshot.layers

    def fork(self) -> MmapStore:
        """Return a store that shares this one's files; what is appended to it stays out of them."""
        return self._with(self.layout, self.layers)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> MmapStore:
        """Return the same rows and ids in another dtype, or a fork. Raises NotSupported: not the CPU."""
        layout = self.layout.to(device, dtype)
        if layout == self.layout:
            return self.fork()
        store = self._with(layout, [SegmentedRows(layout) for _ in self.layers])
        for layer, segments in enumerate(self.layers):
            step = max(1, self.options.bytes_in_memory // (layout.row_bytes * layout.layers))
            for ids in segments.ids.split(step):
                store.append_as(layer, ids, segments.gather(ids).to(dtype=layout.dtype))
        store.next_ids = list(self.next_ids)
        return store

    def _with(self, layout: StoreLayout, layers: Sequence[SegmentedRows]) -> MmapStore:
        store = type(self)(layout, self.options)
        store.layers, store.next_ids, store.scratch = tuple(layers), list(self.next_ids), self.scratch
        return store

    @property
    def nbytes(self) -> int:
        """Bytes of all rows, in files and in memory, spare capacity and removed rows included."""
        return sum(source.nbytes for source in segment_sources(self.layers))


class Scratch:
    """Where a store by itself puts files; a temporary folder is made when it is first needed."""

    def __init__(self, directory: str | None) -> None:
        self._given = None if directory is None else Path(directory).absolute()
        self._made: Path | None = None
        self._lock = ProcessLock()

    def path(self) -> Path:
        """Return a name for a new file."""
        with self._lock.here():
            if self._given is not None:
                try:
                    FileSystem().make_folder(self._given)
                except OSError as error:
                    raise ConfigError(
                        f"directory must be a folder or a path where one can be made, got {str(self._given)!r}: "
                        f"{error.strerror or error}"
                    ) from error
            elif self._made is None:
                self._made = Path(tempfile.mkdtemp(prefix="mplus-"))
                weakref.finalize(self, _remove, self._made, os.getpid())
        return (self._given or self._made or Path()) / f"rows-{secrets.token_hex(8)}.safetensors"


def mapped_store(store: MemoryStore) -> MmapStore:
    """Return the store of mapped files in a directory's store. Raises MemoryMismatchError: there is none."""
    found = parts_of(store)[-1]
    if not isinstance(found, MmapStore):
        raise MemoryMismatchError(
            f"a memory in a directory needs a store around {MmapStore.name!r}, got {found.name!r}: stores that wrap "
            "another have it as their attribute 'inner'"
        )
    return found


def bytes_in_files(store: MemoryStore) -> int:
    """Return the bytes of a store's rows that are in mapped files, and not in memory."""
    innermost = parts_of(store)[-1]
    return innermost.nbytes - innermost.bytes_in_memory if isinstance(innermost, MmapStore) else 0


def _remove_with(layers: Sequence[SegmentedRows], path: Path) -> None:
    """Let the file at ``path`` go with the last who looks at it."""
    for source in segment_sources(layers):
        file = getattr(source, "file", None)
        if isinstance(file, BlockFile) and file.path == path:
            weakref.finalize(file, _remove, path, os.getpid())
            return


def _remove(path: Path, process: int) -> None:
    if process != os.getpid():  # in a child the file or folder is still its parent's
        return
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
