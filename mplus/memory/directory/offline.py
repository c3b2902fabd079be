"""Describe and check a memory in a directory, list its sources and change it, without its decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import attrs
from attrs import define

from mplus.errors import InputError, MemoryFileError, MemoryMismatchError, MPlusError
from mplus.memory.directory.checkpoint import CheckpointContent
from mplus.memory.directory.checkpoint_manifest import LiveManifest, read_live_manifest
from mplus.memory.directory.directory import Directory
from mplus.memory.directory.journal import records
from mplus.memory.directory.lock import acquire
from mplus.memory.directory.open import read_directory, read_present
from mplus.memory.format.entries import layout_from
from mplus.memory.format.folder import MANIFEST, hold, mode_of
from mplus.memory.format.rules import PIECE_ROWS, finite, rules
from mplus.memory.format.save import ManifestHeader, stream_entry
from mplus.memory.sources.forget import without_unused_sources
from mplus.memory.sources.table import SourceTable
from mplus.memory.state import StreamState
from mplus.memory.transaction import ChangeToken
from mplus.stores.base import MemoryStore
from mplus.stores.disk.block_file import BlockFile, FileEntry
from mplus.stores.disk.files import FileSystem, Folder, writable


@define(frozen=True, kw_only=True)
class DirectoryInfo:
    """Contents of a directory, with what its journal adds.

    Attributes:
        manifest: of its checkpoint, but with the streams as they are now.
        sources: of each stream.
        records, journal_bytes: of the journal.
        disk_bytes: of all files that it names.
        ram_bytes: that an opening takes (``mplus.memory_bytes``).
        texts_kept: whether texts are.
    """

    manifest: LiveManifest
    sources: list[SourceTable]
    records: int
    journal_bytes: int
    disk_bytes: int
    ram_bytes: int
    texts_kept: bool


def read_info(folder: Path) -> DirectoryInfo:
    """Describe a memory in a directory, while it may be written. Raises MemoryFileError: it is damaged, or none."""
    with hold(folder) as held:
        manifest, content, (size, records) = read_present(held)
    views = content.views()
    rows = sum(entry.bytes for store in manifest.stores for entry in store.files)
    streams = tuple(stream_entry(view, n, manifest.streams[n].mechanism) for n, view in enumerate(views))
    return DirectoryInfo(
        manifest=attrs.evolve(manifest, streams=streams),
        sources=[state.sources for state in content.states],
        records=records,
        journal_bytes=size,
        disk_bytes=rows + manifest.state.bytes + size,
        ram_bytes=manifest.state.bytes + size,
        texts_kept=any(state.texts is not None for state in content.states),
    )


T = TypeVar("T")

OfflineChange = Callable[[list[StreamState], list[MemoryStore]], T]
"""Changes a list of states, and stores; returns what it did, which counts as nothing where it is False."""


def change_live(folder: Path, change: OfflineChange[T], files: FileSystem | None = None) -> T:
    """Make a change of a memory in a directory, and write a checkpoint without what was removed.

    After an error or a crash the directory is as before, or wholly changed.

    The retriever's indexes, which only the decoder's mechanism can change, are left out: the next read makes them anew.

    Args:
        folder: of the memory.
        change: makes it.
        files: does what is done to files; None: the system.

    Raises:
        MemoryFileError: as ``present``, or the folder cannot be written.
        LiveMemoryError: it is open for writing; says by which process.
    """
    files, held = files or FileSystem(), hold(folder)
    read_live_manifest(held)  # before a lock is left in a folder of another kind
    held.file_mode = mode_of(held / MANIFEST)
    with writable(folder):
        directory = Directory(held, files, acquire(files, held))
    try:
        manifest, content, (size, count) = read_present(held)
        result = change(content.states, content.stores)
        if result:
            with writable(folder):
                directory.resume(manifest, size, count)
                _replace(directory, manifest, content)
            directory.check_removed()
        return result
    finally:
        directory.close()


def chosen(row: int | None, streams: int) -> Sequence[int]:
    """Return the numbers of the streams to look at. Raises InputError: there is no such stream."""
    if row is not None and row not in range(streams):
        raise InputError(f"the stream must be one of 0 to {streams - 1}, got {row}")
    return range(streams) if row is None else [row]


def _replace(directory: Directory, manifest: LiveManifest, content: CheckpointContent) -> None:
    """Write a checkpoint of ``content``, without what was removed."""
    header = ManifestHeader(
        fingerprint=manifest.fingerprint, eviction=manifest.eviction, bytes_budget=manifest.bytes_budget
    )
    layers = range(manifest.layout.layers)
    noted = [notes if any(len(notes.layer(n).ids) for n in layers) else None for notes in content.access_logs if notes]
    states = [without_unused_sources(view).state for view in content.views()]
    kept = CheckpointContent(states, content.stores, content.draws, noted)
    token = ChangeToken()
    try:
        directory.checkpoint(token, kept, header, clean=True)
    except BaseException:
        directory.resolve(token)
        raise


# ---------------------------------------------------------------------- checking


def directory_faults(folder: Path | Folder) -> Iterator[str]:
    """Yield every fault of the memory that lives in ``folder``, a sentence each; nothing is changed.

    Reads every byte. A writer may be at work: what is checked is one checkpoint and its journal.
    """
    try:
        manifest = read_live_manifest(folder)
    except MemoryFileError as error:
        yield str(error)
        return
    found: list[str] = []
    for entry in (manifest.state, *(entry for store in manifest.stores for entry in store.files)):
        found += file_faults(folder, entry)
    try:
        for _ in records(folder / manifest.journal):
            pass
    except MemoryFileError as error:
        found.append(str(error))
    if found:
        yield from found
        return
    try:
        content, _ = read_directory(folder, manifest, layout_from(manifest.layout))
    except MPlusError as error:  # all as it was written, and yet it does not fit together, or its store is not known
        yield str(error)
        return
    try:
        yield from _values(folder, manifest, content)
    except MemoryFileError as error:  # what long-term rows say is looked at as they are read
        yield str(error)


def file_faults(folder: Path | Folder, entry: FileEntry) -> Iterator[str]:
    """Yield a sentence for every block of a file that is not what was written."""
    try:
        file = BlockFile(folder / entry.file, entry)
    except MemoryFileError as error:
        yield str(error)
        return
    for name, begin, end in file.damaged():
        width = max(1, file.span(name).row_bytes)
        yield (
            f"{file.path}: tensor {name!r} must have the checksums it was written with, and has another in "
            f"rows {begin // width} to {(end - 1) // width}: it was altered"
        )


def _values(folder: Path | Folder, manifest: LiveManifest, content: CheckpointContent) -> Iterator[str]:
    """Yield a sentence for rows whose values make no sense, though they are what was written."""
    for number, (state, store) in enumerate(zip(content.states, content.stores, strict=True)):
        known = state.sources.column("number")
        try:
            state.sources.find(None)
        except MemoryMismatchError as error:
            yield f"{folder}: the sources of stream {number} must be as they were written: {error}"
        for layer in range(manifest.layout.layers):
            places = [(name, parts[layer]) for name, parts in state.row_lists().items() if layer < len(parts)]
            places += [("ltm", store.gather(layer, ids)) for ids in store.ids(layer).split(PIECE_ROWS)]
            for tier, rows in places:
                where = f"{folder}: {tier} of layer {layer} in stream {number}"
                for rule, kept in (*finite(rows), *rules(rows, state.clock, known)):
                    if not bool(kept.all()):
                        yield f"{where} must have {rule}, {int((~kept).sum())} of {len(rows)} rows break it"
