"""Saving what is sound of a damaged memory, without a decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from mplus.errors import MemoryFileError, MemoryMismatchError
from mplus.memory.durable.manifest import read_live_manifest
from mplus.memory.durable.salvage import Salvaged, nameless, salvage, sources_in
from mplus.memory.earlier import in_present_form, renamed
from mplus.memory.entries import DTYPES, StreamEntry, TensorEntry
from mplus.memory.files import Facts, layout_from, save
from mplus.memory.folder import hold, lock
from mplus.memory.manifest import LIVE_FORMAT, Manifest, is_memory, read_manifest
from mplus.memory.sources import SourceTable
from mplus.memory.stream import StreamState, StreamView
from mplus.memory.tensors import TensorReader, Tensors
from mplus.memory.texts import Waiting
from mplus.memory.unpacking import COLUMNS, read_generator, read_sources, read_tail, read_texts
from mplus.rows import MemoryRows
from mplus.stores.base import MemoryStore, StoreLayout
from mplus.stores.disk.folder import Folder
from mplus.stores.mmap import MmapStore

T = TypeVar("T")
UNREADABLE = "what was written can be read, but not written again"


def repair(path: str | Path, out: str | Path) -> list[str]:
    """Save what checksums prove good of the memory in ``path`` as a new memory in ``out``; ``path`` stays as it is.

    Rows are kept whose every column is what was written; of a saved memory, which has a checksum per column and not per
    block, layers. When rows were last retrieved is not kept. ``Memory.load`` reads the result.

    Args:
        path: a folder written by ``Memory.save``, or a directory in which a memory lives.
        out: a folder that is empty or does not exist.

    Returns:
        What was lost, a sentence each; none: everything is there.

    Raises:
        MemoryFileError: nothing can be saved, because the manifest or the structure of the file with the short-term
            rows is damaged; or ``out`` cannot be written, or holds something.
    """
    folder, out = hold(path), Path(out).absolute()
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise MemoryFileError(
            f"{out} must be empty or not exist yet, to put a repaired memory there: choose another path"
        )
    if is_memory(folder, LIVE_FORMAT):
        live = read_live_manifest(folder)
        found, budget = salvage(folder, live), live.bytes_budget
        facts = Facts(fingerprint=live.fingerprint, eviction=live.eviction, bytes_budget=budget)
    else:
        held = lock(folder, shared=True)
        try:
            manifest = read_manifest(folder)
            found = _salvage_saved(folder, manifest)
        finally:
            held.release()
        budget = manifest.bytes_budget
        facts = Facts(fingerprint=manifest.fingerprint, eviction=manifest.eviction, bytes_budget=budget)
    views = [StreamView(state, store) for state, store in zip(found.states, found.stores, strict=True)]
    save(out, views, found.draws, facts)
    return found.lost


def _salvage_saved(folder: Folder, manifest: Manifest) -> Salvaged:
    layout, found = layout_from(manifest.layout), Salvaged()
    with TensorReader(folder, manifest.data) as opened:
        file = _Described(in_present_form(opened, manifest.earlier), manifest.data.tensors)
        stores = {}
        for number, entry in enumerate(manifest.streams):
            if entry.store not in stores:
                stores[entry.store] = _store(file, entry, layout, found.lost)
            found.stores.append(stores[entry.store])
            found.states.append(_state(file, number, entry, stores[entry.store], found.lost))
            found.draws.append(_generator(file, number, found.lost))
    return found


class _Described:
    """A file, and what its manifest says of its tensors."""

    def __init__(self, file: Tensors, described: Mapping[str, TensorEntry]) -> None:
        self.path, self._file = file.path, file
        self._described = {renamed(name): entry for name, entry in described.items()}

    @property
    def lasting(self) -> bool:
        return self._file.lasting

    @property
    def tensors(self) -> Mapping[str, object]:
        return self._file.tensors

    def get(self, name: str) -> Tensor:
        return self._file.get(name)

    def nothing_like(self, name: str, *, rows: bool) -> Tensor:
        """A tensor that was damaged, in zeros; ``rows``: without any row."""
        entry = self._described[name]
        return torch.zeros((0, *entry.shape[1:]) if rows else entry.shape, dtype=DTYPES[entry.dtype])


def _rows(file: Tensors, prefix: str, count: int, layout: StoreLayout, like: MemoryRows, lost: list[str]) -> MemoryRows:
    """The rows of a layer if all their columns are sound, else none."""
    columns: dict[str, Tensor] = {}
    try:
        for name in COLUMNS:
            if f"{prefix}.{name}" in file.tensors:
                columns[name] = file.get(f"{prefix}.{name}").clone()
    except MemoryFileError as error:
        lost.append(f"{prefix}: all {count} rows ({error})")
        return like
    if {column.shape[0] for column in columns.values()} != {count} or not {"birth", "source"} <= columns.keys():
        lost.append(f"{prefix}: all {count} rows (its columns do not fit together)")
        return like
    return MemoryRows.of(columns)


def _empty(layout: StoreLayout, file: Tensors, prefix: str) -> MemoryRows:
    """No rows, with the columns that the manifest lists."""
    described = layout.columns()
    names = [name for name in COLUMNS if f"{prefix}.{name}" in file.tensors and name in described]
    return MemoryRows.of({name: torch.empty(0, *described[name][0], dtype=described[name][1]) for name in names})


def _state(file: _Described, number: int, entry: StreamEntry, store: MemoryStore, lost: list[str]) -> StreamState:
    layout = store.layout

    def part(name: str, layer: int, count: int) -> MemoryRows:
        prefix = f"stream.{number}.rows.{name}.{layer}"
        return _rows(file, prefix, count, layout, _empty(layout, file, prefix), lost)

    def tensor(name: str) -> Tensor:
        try:
            return file.get(name).clone()
        except MemoryFileError as error:
            rows = ".newest." in name
            lost.append(f"{name} ({error})" if rows else f"{name}: set to zero ({error})")
            return file.nothing_like(name, rows=rows)

    mark = f"stream.{number}.state."
    rows = {name: [part(name, layer, n) for layer, n in enumerate(counts)] for name, counts in entry.rows.items()}
    held = [*(part.source for parts in rows.values() for part in parts), *sources_in(store)]
    sources = _sources(file, number, entry, held, lost)
    numbers = sources.column("number")
    nothing: tuple[Waiting, ...] = ()
    tail = _or_lost(partial(read_tail, file, number, numbers), f"stream.{number}.tail", "all of it", nothing, lost)
    try:
        return StreamState.from_parts(
            layout,
            rows,
            {name.removeprefix(mark): tensor(name) for name in file.tensors if name.startswith(mark)},
            clock=entry.clock,
            sources=sources,
            texts=_or_lost(partial(read_texts, file, number, numbers), f"stream.{number}.text", UNREADABLE, None, lost),
            tail=tail,
        )
    except MemoryMismatchError as error:
        raise MemoryFileError(f"{file.path}: stream {number} does not fit together: {error}") from error


def _sources(file: Tensors, number: int, entry: StreamEntry, held: Sequence[Tensor], lost: list[str]) -> SourceTable:
    try:
        return read_sources(file, number, entry)
    except MemoryFileError as error:
        lost.append(f"stream.{number}.sources: what the sources are called ({error})")
        return nameless(held, entry.next_source)


def _or_lost(read: Callable[[], T], where: str, what: str, otherwise: T, lost: list[str]) -> T:
    try:
        return read()
    except MemoryFileError as error:
        lost.append(f"{where}: {what} ({error})")
        return otherwise


def _store(file: Tensors, entry: StreamEntry, layout: StoreLayout, lost: list[str]) -> MmapStore:
    store = MmapStore(layout)
    for layer, count in enumerate(entry.ltm):
        prefix = f"store.{entry.store}.{layer}"
        rows = _rows(file, prefix, count, layout, _empty(layout, file, prefix), lost)
        if len(rows):
            store.append(layer, rows)
    return store


def _generator(file: Tensors, number: int, lost: list[str]) -> Tensor:
    try:
        return read_generator(file, number).get_state()
    except MemoryFileError as error:
        lost.append(f"stream.{number}.generator: begins anew ({error})")
        return torch.Generator().manual_seed(number).get_state()
