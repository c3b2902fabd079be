"""LiveManifest: the manifest of a memory in a directory, which names the files of its checkpoint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import attrs
from attrs import define, field

from mplus.errors import MemoryFileError
from mplus.memory.format.entries import LayoutEntry, StreamEntry
from mplus.memory.format.folder import MANIFEST
from mplus.memory.format.manifest import LIVE_FORMAT, check_streams, component, fingerprint, from_file, to_text
from mplus.memory.format.structure import NOT_IN_FILES, check_name, named_like, whole
from mplus.memory.sources.table import SourceTable
from mplus.stores.disk.block_file import FileEntry
from mplus.stores.disk.files import Folder

VERSION = 5
"""Format version that is written, and the newest that is read.

4: sources do not say when they were last written, and writes have no ids.
3: a record of the journal holds every tensor that has changed whole, also where it only grew.
2: the manifest lists the sources; tensors and journal have the names of ``mplus.memory.format.earlier`` and
``mplus.memory.directory.record``.
1: besides, block files have a CRC-32 for every 8 KiB (those that are not rewritten stay as they are in a directory of a
later version), and rows are in no other form than they are read.
"""
PRESENT_NAMES = 3
"""The oldest format version whose manifest and journal have the names and fields of this one."""
STATE = "state-{}-{}.safetensors"
JOURNAL = "journal-{}-{}.bin"
ROWS = "rows-{}-{}.safetensors"
NEW_MANIFEST = "manifest-{}.json.new"
"""Names of files: the memory's id (see ``lock.py``), and the checkpoint's number or, of rows, something random."""
_STATE, _JOURNAL, _ROWS = (
    r"state-([0-9a-f]{16}-)?\d+\.safetensors",
    r"journal-([0-9a-f]{16}-)?\d+\.bin",
    r"rows-([0-9a-f]{16}-)?[0-9a-f]+\.safetensors",
)
LOCK = "lock"
OWN = re.compile(
    r"state-(?:([0-9a-f]{16})-)?\d+\.safetensors|rows-(?:([0-9a-f]{16})-)?[0-9a-f]+\.safetensors"
    r"|journal-(?:([0-9a-f]{16})-)?\d+\.bin|manifest-([0-9a-f]{16})\.json\.new"
)
"""Names that files of checkpoints have, of this one or another; without an id: of earlier versions."""


@define(frozen=True, kw_only=True)
class StoreEntry:
    """The long-term rows of one stream.

    Attributes:
        files: those with lower ids first.
        next_ids: per layer, the next id to give.
    """

    files: tuple[FileEntry, ...]
    next_ids: tuple[int, ...] = field(validator=whole())


@define(frozen=True, kw_only=True)
class LiveManifest:
    """A checkpoint without its rows.

    Attributes:
        version: of the format.
        written_by: version of mplus that wrote it.
        number: of the checkpoint, growing.
        fingerprint: facts about the decoder that a memory depends on (``Engine.fingerprint``).
        layout: what the rows look like.
        eviction: policy of the long-term memory, by name or as a table with its options.
        bytes_budget: bytes that all rows may take; None: none was given.
        streams: one per batch row.
        state: the file with all but the long-term rows.
        stores: one per batch row.
        journal: file of what happened since.
        store: what is around the mapped files and makes something else of rows; "mmap": nothing. (Version 1 has none.)
        earlier: of format versions 1 and 2, the sources of each stream.
    """

    version: int = VERSION
    written_by: str
    number: int = field(validator=whole())
    # Any, as types are resolved when a file is read, and JSON's recursive one cannot be.
    fingerprint: dict[str, Any] = field(validator=fingerprint)
    layout: LayoutEntry
    eviction: Any = field(validator=component)
    bytes_budget: int | None = field(default=None, validator=attrs.validators.optional(whole(1)))
    streams: tuple[StreamEntry, ...]
    state: FileEntry
    stores: tuple[StoreEntry, ...]
    journal: str = field(validator=named_like(_JOURNAL, JOURNAL.format("<id>", "<n>")))
    store: Any = field(default="mmap", validator=component)
    earlier: tuple[SourceTable, ...] = field(default=(), metadata=NOT_IN_FILES)

    def to_json(self) -> str:
        """Return the text of the file."""
        return to_text(self, LIVE_FORMAT)

    @property
    def files(self) -> frozenset[str]:
        """Names of all files that belong to it."""
        rows = (entry.file for store in self.stores for entry in store.files)
        return frozenset([self.state.file, self.journal, *rows])


def owner_in(name: str) -> str | None:
    """Return the id of the memory that a file belongs to by its name; None: of none, or of an earlier version."""
    found = OWN.fullmatch(name)
    return None if found is None else next((owner for owner in found.groups() if owner), None)


def read_live_manifest(folder: Path | Folder) -> LiveManifest:
    """Read the manifest in ``folder``.

    Raises:
        MemoryFileError: there is none, it was truncated or altered, is of a newer format, or is something else.
    """
    file = folder / MANIFEST
    manifest = from_file(file, LiveManifest, LIVE_FORMAT, VERSION, "a memory in a directory", present=PRESENT_NAMES)
    try:
        check_streams(manifest)
        _check_files(manifest)
    except ValueError as error:
        raise MemoryFileError(f"{file} does not describe a memory: {error}") from error
    return manifest


def _check_files(manifest: LiveManifest) -> None:
    """Raise ValueError where what the manifest says of files contradicts itself, or the rest."""
    layers = manifest.layout.layers
    if len(manifest.streams) != len(manifest.stores):
        raise ValueError(
            f"there must be one store for each stream, got {len(manifest.stores)} and {len(manifest.streams)}"
        )
    _check_file(manifest.state, "state", _STATE, STATE)
    rows = sum(sum(map(sum, stream.rows.values())) for stream in manifest.streams)
    sources = sum(stream.sources for stream in manifest.streams)
    if rows * manifest.layout.least_bytes + 8 * sources > manifest.state.bytes:
        raise ValueError(f"state must have the bytes of {rows} rows and {sources} sources, got {manifest.state.bytes}")
    for number, (stream, store) in enumerate(zip(manifest.streams, manifest.stores, strict=True)):
        if stream.store != number:
            raise ValueError(f"streams[{number}].store must be {number}, got {stream.store}")
        if len(store.next_ids) != layers:
            raise ValueError(f"stores[{number}].next_ids must have {layers} entries, got {len(store.next_ids)}")
        for place, entry in enumerate(store.files):
            _check_file(entry, f"stores[{number}].files[{place}]", _ROWS, ROWS)
        names = [entry.file for entry in store.files]
        if len(set(names)) != len(names):
            raise ValueError(f"stores[{number}].files must be different files, got {names}")
        size = sum(entry.bytes for entry in store.files)
        if 8 * sum(stream.ltm) > size:
            raise ValueError(f"stores[{number}] must have the bytes of {sum(stream.ltm)} rows, got {size}")


def _check_file(entry: FileEntry, where: str, pattern: str, template: str) -> None:
    check_name(f"{where}.file", entry.file, pattern, template.format("<id>", "<n>"))
    check_name(f"{where}.sha256", entry.sha256, "[0-9a-f]{64}", "<64 hex digits>")
    if entry.bytes < 0:
        raise ValueError(f"{where}.bytes must be at least 0, got {entry.bytes}")
