"""Check a memory in a directory, every byte and every value (``mplus memory verify``)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mplus.errors import MemoryFileError, MemoryMismatchError, MPlusError
from mplus.memory.directory.checkpoint import CheckpointContent
from mplus.memory.directory.checkpoint_manifest import LiveManifest, read_live_manifest
from mplus.memory.directory.journal import records
from mplus.memory.directory.open import read_directory
from mplus.memory.format.entries import layout_from
from mplus.memory.format.rules import PIECE_ROWS, finite, rules
from mplus.stores.disk.block_file import BlockFile, FileEntry
from mplus.stores.disk.files import Folder


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
