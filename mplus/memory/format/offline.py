"""List the sources of a memory on disk and forget one, without the decoder it belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from attrs import evolve

from mplus.config import Component
from mplus.errors import MemoryFileError
from mplus.memory.directory.offline import chosen, forget_live, live_sources
from mplus.memory.format.earlier import in_present_form
from mplus.memory.format.entries import layout_from, state_class
from mplus.memory.format.folder import MANIFEST, check_removed, hold, lock, mode_of
from mplus.memory.format.load import check_names, read_access_log, read_sources, read_streams
from mplus.memory.format.manifest import LIVE_FORMAT, Manifest, is_memory, read_manifest, rows_per_chunk
from mplus.memory.format.save import ManifestHeader, replace, store_numbers
from mplus.memory.format.tensors import TensorReader, Tensors
from mplus.memory.report import ForgetReport, SourceInfo
from mplus.memory.sources.forget import forget
from mplus.memory.sources.listing import Held, listed
from mplus.memory.sources.table import SourceTable
from mplus.memory.state import LONG_TERM, StreamView
from mplus.stores.base import MemoryStore


def saved_sources(path: str | Path) -> list[list[SourceInfo]]:
    """List the sources of every stream of the memory in the folder ``path``, as ``Memory.sources`` does.

    Of a saved memory only births and sources are read; of one that lives there, beside whoever writes, what an opening
    reads.

    Raises:
        MemoryFileError: missing, truncated, altered, foreign, or newer file.
    """
    folder = Path(path)
    if is_memory(folder, LIVE_FORMAT):
        return live_sources(folder)
    here = hold(folder)
    held = lock(here, shared=True)
    try:
        manifest = read_manifest(here)
        with TensorReader(here, manifest.data) as opened:
            file = in_present_form(opened, manifest.earlier)
            check_names(file, manifest)
            return [_sources(file, manifest, number) for number in range(len(manifest.streams))]
    finally:
        held.release()


def saved_tables(path: str | Path) -> tuple[Manifest, list[SourceTable]]:
    """Read the manifest of a saved memory, and the table of sources of each stream. Raises MemoryFileError."""
    here = hold(Path(path))
    held = lock(here, shared=True)
    try:
        manifest = read_manifest(here)
        with TensorReader(here, manifest.data) as opened:
            file = in_present_form(opened, manifest.earlier)
            return manifest, [read_sources(file, number, entry) for number, entry in enumerate(manifest.streams)]
    finally:
        held.release()


def forget_saved(
    path: str | Path, source: str | None, row: int | None = None, *, keep_name: bool = False
) -> ForgetReport:
    """Write the memory in the folder ``path`` anew without the rows, texts and name of ``source``.

    What is there stays whole until the new files are on disk, and then is removed. All long-term rows of a saved memory
    pass through memory; of one that lives there, only files that hold such rows are written anew.

    Args:
        path: as given to ``Memory.save`` or ``Memory.open``.
        source: a name that was given to ``write``.
        row: stream to take it out of; None: all.
        keep_name: as for ``Memory.forget``.

    Raises:
        MemoryFileError: as ``saved_sources``, or the folder cannot be written.
        InputError: no stream has this source, or there is no such stream; nothing was changed.
        LiveMemoryError: somebody has the directory open for writing; says who.
    """
    folder = Path(path)
    if is_memory(folder, LIVE_FORMAT):
        return forget_live(folder, source, row, keep_name=keep_name)
    here = hold(folder)
    held = lock(here)
    try:
        manifest = read_manifest(here)
        here.file_mode = mode_of(here / MANIFEST)
        rows = chosen(row, len(manifest.streams))
        with TensorReader(here, manifest.data) as opened:
            file = in_present_form(opened, manifest.earlier)
            check_names(file, manifest)
            states, stores, generators = read_streams(file, manifest, layout_from(manifest.layout), Component("ram"))
            noted = any(name.startswith("stream.") and ".usage." in name for name in file.names)
            access_logs = [read_access_log(file, n, store) if noted else None for n, store in enumerate(stores)]
        report = forget(states, _own(stores, rows), rows, source, keep_name=keep_name)
        views = [StreamView(*parts) for parts in zip(states, stores, access_logs, strict=True)]
        draws = [generator.get_state() for generator in generators]
        left = replace(here, views, draws, store_numbers(stores), _facts(manifest))
        check_removed(here, left)
        return report
    finally:
        held.release()


def _own(stores: list[MemoryStore], rows: Sequence[int]) -> list[MemoryStore]:
    """Return the stores, in which streams that lose rows share theirs with no other."""
    for row in rows:
        if sum(store is stores[row] for store in stores) > 1:
            stores[row] = stores[row].fork()
    return stores


def _facts(manifest: Manifest) -> ManifestHeader:
    return ManifestHeader(
        fingerprint=manifest.fingerprint,
        eviction=manifest.eviction,
        bytes_budget=manifest.bytes_budget,
        capacity=manifest.capacity,
        text_capacity=manifest.text_capacity,
    )


def _held(file: Tensors, prefix: str, count: int) -> Held:
    """Read sources and births of the rows of one layer. Raises MemoryFileError: there are not so many of them."""
    columns = [file.get(f"{prefix}.{name}") for name in ("source", "birth")]
    for column in columns:
        if column.dtype != torch.int64 or column.shape != (count,):
            raise MemoryFileError(
                f"{file.path}: {prefix} must have {count} sources and births, int64, got {column.dtype} "
                f"{list(column.shape)}"
            )
    return Held(*columns)


def _sources(file: Tensors, manifest: Manifest, number: int) -> list[SourceInfo]:
    stream = manifest.streams[number]
    state = state_class(stream.mechanism)

    def held(prefix: str, counts: Sequence[int]) -> list[Held]:
        return [_held(file, f"{prefix}.{layer}", count) for layer, count in enumerate(counts)]

    tiers = {}
    for name, counts in stream.rows.items():
        found = held(f"stream.{number}.rows.{name}", counts)
        on_clock = [evolve(rows, births=state.births(name, rows.births, stream.clock)) for rows in found]
        tiers[state.lists.get(name, name)] = on_clock
    tiers[LONG_TERM] = held(f"store.{stream.store}", stream.ltm)
    rows = rows_per_chunk(manifest.fingerprint)
    return listed(read_sources(file, number, stream), tiers, manifest.layout.layers, stream.clock, rows)
