"""Saving what is sound of a damaged memory, without a decoder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mplus.errors import MemoryFileError
from mplus.memory.durable.manifest import read_live_manifest
from mplus.memory.durable.salvage import Salvaged, salvage
from mplus.memory.files import Facts, layout_from, save
from mplus.memory.folder import hold, lock
from mplus.memory.manifest import LIVE_FORMAT, Manifest, StreamEntry, is_memory, read_manifest
from mplus.memory.stream import StreamState, StreamView
from mplus.memory.tensors import TensorReader
from mplus.memory.texts import Texts
from mplus.memory.unpacking import COLUMNS, read_generator, read_texts
from mplus.rows import MemoryRows
from mplus.stores.base import StoreLayout
from mplus.stores.disk.folder import Folder
from mplus.stores.mmap import MmapStore


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
    with TensorReader(folder, manifest.data) as file:
        stores = {}
        for number, entry in enumerate(manifest.streams):
            found.states.append(_state(file, number, entry, layout, found.lost))
            if entry.store not in stores:
                stores[entry.store] = _store(file, entry, layout, found.lost)
            found.stores.append(stores[entry.store])
            found.draws.append(_generator(file, number, found.lost))
    return found


def _rows(
    file: TensorReader, prefix: str, count: int, layout: StoreLayout, like: MemoryRows, lost: list[str]
) -> MemoryRows:
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


def _empty(layout: StoreLayout, file: TensorReader, prefix: str) -> MemoryRows:
    """No rows, with the columns that the manifest lists."""
    described = layout.columns()
    names = [name for name in COLUMNS if f"{prefix}.{name}" in file.tensors and name in described]
    return MemoryRows.of({name: torch.empty(0, *described[name][0], dtype=described[name][1]) for name in names})


def _state(file: TensorReader, number: int, entry: StreamEntry, layout: StoreLayout, lost: list[str]) -> StreamState:
    def tier(name: str, counts: tuple[int, ...]) -> tuple[MemoryRows, ...]:
        prefixes = [f"stream.{number}.{name}.{layer}" for layer in range(layout.layers)]
        return tuple(
            _rows(file, prefix, count, layout, _empty(layout, file, prefix), lost)
            for prefix, count in zip(prefixes, counts, strict=True)
        )

    def tensor(name: str) -> Tensor:
        try:
            return file.get(name).clone()
        except MemoryFileError as error:
            entry = file.data.tensors[name]
            lost.append(f"{name}: set to zero ({error})" if ".counter." in name else f"{name} ({error})")
            shape = entry.shape if ".counter." in name else (0, *entry.shape[1:])
            return torch.zeros(shape, dtype=getattr(torch, entry.dtype))

    mark = f"stream.{number}.counter."
    names = [f"stream.{number}.newest.{layer}" for layer in range(layout.layers)]
    return StreamState(
        stm=tier("stm", entry.stm),
        pending=tier("pending", entry.pending),
        clock=entry.clock,
        sources=entry.sources,
        texts=_texts(file, number, len(entry.sources), lost),
        newest=tuple(tensor(name) for name in names if name in file.tensors),
        counters={name.removeprefix(mark): tensor(name) for name in file.tensors if name.startswith(mark)},
    )


def _texts(file: TensorReader, number: int, sources: int, lost: list[str]) -> Texts | None:
    try:
        return read_texts(file, number, sources)
    except MemoryFileError as error:
        lost.append(f"stream.{number}.text: what was written can be read, but not written again ({error})")
        return None


def _store(file: TensorReader, entry: StreamEntry, layout: StoreLayout, lost: list[str]) -> MmapStore:
    store = MmapStore(layout)
    for layer, count in enumerate(entry.ltm):
        prefix = f"store.{entry.store}.{layer}"
        rows = _rows(file, prefix, count, layout, _empty(layout, file, prefix), lost)
        if len(rows):
            store.append(layer, rows)
    return store


def _generator(file: TensorReader, number: int, lost: list[str]) -> Tensor:
    try:
        return read_generator(file, number).get_state()
    except MemoryFileError as error:
        lost.append(f"stream.{number}.generator: begins anew ({error})")
        return torch.Generator().manual_seed(number).get_state()
