"""List the sources of a memory on disk, read and change them, without the decoder it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from attrs import evolve

from mplus.config import Component
from mplus.errors import MemoryFileError, NotSupported
from mplus.mechanisms import MECHANISMS
from mplus.memory.directory.checkpoint_manifest import LiveManifest, read_live_manifest
from mplus.memory.directory.offline import OfflineChange, change_live, chosen
from mplus.memory.directory.open import read_present
from mplus.memory.format.earlier import in_present_form
from mplus.memory.format.entries import layout_from, state_class
from mplus.memory.format.folder import MANIFEST, check_removed, hold, lock, mode_of
from mplus.memory.format.load import check_names, read_access_log, read_sources, read_streams, read_tail
from mplus.memory.format.manifest import LIVE_FORMAT, Manifest, is_memory, read_manifest, rows_per_chunk
from mplus.memory.format.save import ManifestHeader, replace, store_numbers
from mplus.memory.format.tensors import TensorReader, Tensors
from mplus.memory.report import ForgetReport, SourceInfo
from mplus.memory.sources.expiry import due_sources, mark_pinned
from mplus.memory.sources.forget import forget, unshare
from mplus.memory.sources.listing import Held, listed, sources_of
from mplus.memory.sources.table import SourceTable
from mplus.memory.sources.text import text_of_source
from mplus.memory.state import LONG_TERM, PlainState, StreamState, StreamView
from mplus.stores.base import MemoryStore
from mplus.stores.disk.files import FileSystem, Folder
from mplus.tokenizer import Tokenizer

T = TypeVar("T")


def saved_sources(path: str | Path) -> list[list[SourceInfo]]:
    """List the sources of every stream of the memory in the folder ``path``, as ``Memory.sources`` does.

    Of a saved memory only births and sources are read; of one that lives there, beside whoever writes, what an opening
    reads.

    Raises:
        MemoryFileError: missing, truncated, altered, foreign, or newer file.
    """
    folder = Path(path)
    if is_memory(folder, LIVE_FORMAT):
        with hold(folder) as directory:
            live, content, _ = read_present(directory)
        return [sources_of(view, rows_per_chunk(live.fingerprint)) for view in content.views()]

    def take(file: Tensors, manifest: Manifest) -> list[list[SourceInfo]]:
        check_names(file, manifest)
        return [_sources(file, manifest, number) for number in range(len(manifest.streams))]

    return _read(folder, take)


def saved_tables(path: str | Path) -> tuple[Manifest, list[SourceTable]]:
    """Read the manifest of a saved memory, and the table of sources of each stream. Raises MemoryFileError."""

    def take(file: Tensors, manifest: Manifest) -> tuple[Manifest, list[SourceTable]]:
        return manifest, [read_sources(file, number, entry) for number, entry in enumerate(manifest.streams)]

    return _read(Path(path), take)


def forget_saved(
    path: str | Path,
    source: str | None,
    row: int | None = None,
    *,
    keep_name: bool = False,
    files: FileSystem | None = None,
) -> ForgetReport:
    """Write the memory in the folder ``path`` anew without the rows, texts and name of ``source``.

    What is there stays whole until the new files are on disk, and then is removed. All long-term rows of a saved memory
    pass through memory; of one that lives there, only files that hold such rows are written anew.

    Args:
        path: as given to ``Memory.save`` or ``Memory.open``.
        source: a name that was given to ``write``.
        row: stream to take it out of; None: all.
        keep_name: as for ``Memory.forget``.
        files: does what is done to the files of a directory; None: the system.

    Raises:
        MemoryFileError: as ``saved_sources``, or the folder cannot be written.
        InputError: no stream has this source, or there is no such stream; nothing was changed.
        LiveMemoryError: somebody has the directory open for writing; says who.
    """

    def change(states: list[StreamState], stores: list[MemoryStore]) -> ForgetReport:
        rows = chosen(row, len(states))
        # Streams may share a store, which loses no rows of those that were not chosen.
        unshare(stores, rows)
        return forget(states, stores, rows, source, keep_name=keep_name)

    return _changed(Path(path), change, files)


def expire_saved(path: str | Path, now: float) -> list[ForgetReport]:
    """Forget what has expired by ``now`` (in seconds since 1970, UTC), as ``Memory.expire``. Raises MemoryFileError."""

    def change(states: list[StreamState], stores: list[MemoryStore]) -> list[ForgetReport]:
        due = due_sources(states, now)
        unshare(stores, sorted({row for rows in due.values() for row in rows}))
        return [forget(states, stores, rows, name) for name, rows in due.items()]

    return _changed(Path(path), change)


def pin_saved(path: str | Path, source: str | None, row: int | None = None, *, pinned: bool) -> None:
    """Pin a source of the memory in the folder ``path``, or unpin it, as ``Memory.pin``.

    Raises as ``forget_saved``; NotSupported: rows of its mechanism leave at random, or it is not installed.
    """
    if pinned:
        _check_pins(hold(Path(path)))
    _changed(Path(path), lambda states, _: mark_pinned(states, chosen(row, len(states)), source, pinned=pinned))


def _check_pins(folder: Folder) -> None:
    """Raise NotSupported unless rows of a pinned source stay in the memory in a folder.

    Of one that lives there it cannot be told that it has no long-term memory, from which rows could be kept.
    """
    manifest: Manifest | LiveManifest
    manifest = read_live_manifest(folder) if is_memory(folder, LIVE_FORMAT) else read_manifest(folder)
    for name in {stream.mechanism for stream in manifest.streams}:
        if state_class(name) is PlainState:
            raise NotSupported(
                f"pin needs the mechanism {name!r} that the memory was made with, which alone knows whether rows of a "
                "pinned source can stay: install its package (mplus info names it)"
            )
        if not MECHANISMS.get(name).pins or getattr(manifest, "capacity", None) == 0:
            raise NotSupported(
                f"rows of this memory leave it without an eviction policy (mechanism {name!r}, capacity "
                f"{getattr(manifest, 'capacity', None)}), so that none can be pinned"
            )


def saved_text(path: str | Path, source: str | None, row: int = 0, tokenizer: Tokenizer | None = None) -> str:
    """Return what was written from a source to a stream of a memory on disk, as ``Memory.text``. Raises as that."""

    def take(file: Tensors, manifest: Manifest) -> list[StreamState]:
        check_names(file, manifest)
        return read_streams(file, manifest, layout_from(manifest.layout), Component("ram"))[0]

    folder = Path(path)
    if is_memory(folder, LIVE_FORMAT):
        with hold(folder) as directory:  # while another process may write to it
            states = read_present(directory)[1].states
    else:
        states = _read(folder, take)
    (number,) = chosen(row, len(states))
    return text_of_source(states[number], source, tokenizer)


def _read(folder: Path, take: Callable[[Tensors, Manifest], T]) -> T:
    """Return what ``take`` makes of the tensors, in the form that this version writes, and manifest of a saved memory.

    A call and no context manager, for the reason that ``lock`` gives.
    """
    here = hold(folder)
    held = lock(here, shared=True)  # until all is read: a save meanwhile removes the file that the manifest names
    try:
        manifest = read_manifest(here)
        with TensorReader(here, manifest.data) as opened:
            return take(in_present_form(opened, manifest.earlier), manifest)
    finally:
        held.release()


def _changed(folder: Path, change: OfflineChange[T], files: FileSystem | None = None) -> T:
    """Make a change of the memory in a folder, and write it anew where there was anything to do."""
    if is_memory(folder, LIVE_FORMAT):
        return change_live(folder, change, files)
    here = hold(folder)
    held = lock(here)
    try:
        manifest = read_manifest(here)
        here.file_mode = mode_of(here / MANIFEST)
        with TensorReader(here, manifest.data) as opened:
            file = in_present_form(opened, manifest.earlier)
            check_names(file, manifest)
            states, stores, generators = read_streams(file, manifest, layout_from(manifest.layout), Component("ram"))
            # Accesses are noted only where the eviction policy goes by them.
            noted = any(name.startswith("stream.") and ".usage." in name for name in file.names)
            access_logs = [read_access_log(file, n, store) if noted else None for n, store in enumerate(stores)]
        result = change(states, stores)
        if result:
            views = [StreamView(*parts) for parts in zip(states, stores, access_logs, strict=True)]
            draws = [generator.get_state() for generator in generators]
            left = replace(here, views, draws, store_numbers(stores), _facts(manifest))
            check_removed(here, left)
        return result
    finally:
        held.release()


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
    sources = read_sources(file, number, stream)
    tail = read_tail(file, number, sources.column("number"))
    return listed(sources, tiers, manifest.layout.layers, stream.clock, rows, tail)
