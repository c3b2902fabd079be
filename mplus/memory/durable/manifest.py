"""The manifest of a memory in a directory: what its checkpoint is made of."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from attrs import define

from mplus.errors import MemoryFileError
from mplus.memory.folder import MANIFEST
from mplus.memory.manifest import LIVE_FORMAT, LayoutEntry, StreamEntry, from_file, to_text
from mplus.stores.disk.blocks import FileEntry
from mplus.stores.disk.folder import Folder

VERSION = 2
"""Format version that is written, and the newest that is read. 1: block files have a CRC-32 for every 8 KiB (those that
are not rewritten stay as they are in a directory of version 2), and rows are in no other form than they are read."""
STATE = "state-{}-{}.safetensors"
JOURNAL = "journal-{}-{}.bin"
ROWS = "rows-{}-{}.safetensors"
NEW_MANIFEST = "manifest-{}.json.new"
"""Names of files: the memory's id (see ``lock.py``), and the checkpoint's number or, of rows, something random."""
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
    next_ids: tuple[int, ...]


@define(frozen=True, kw_only=True)
class LiveManifest:
    """A checkpoint without its rows.

    Attributes:
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
    """

    written_by: str
    number: int
    fingerprint: dict[str, Any]
    layout: LayoutEntry
    eviction: Any
    bytes_budget: int | None = None
    streams: tuple[StreamEntry, ...]
    state: FileEntry
    stores: tuple[StoreEntry, ...]
    journal: str
    store: Any = "mmap"

    def to_json(self) -> str:
        """The text of the file."""
        return to_text(self, LIVE_FORMAT, VERSION)

    @property
    def files(self) -> frozenset[str]:
        """Names of all files that belong to it."""
        rows = (entry.file for store in self.stores for entry in store.files)
        return frozenset([self.state.file, self.journal, *rows])


def owner_in(name: str) -> str | None:
    """The id of the memory to which a file belongs by its name; None: of none, or of one of an earlier version."""
    found = OWN.fullmatch(name)
    return None if found is None else next((owner for owner in found.groups() if owner), None)


def read_live_manifest(folder: Path | Folder) -> LiveManifest:
    """Read the manifest in ``folder``.

    Raises:
        MemoryFileError: there is none, it was truncated or altered, is of a newer format, or is something else.
    """
    file = folder / MANIFEST
    manifest = from_file(file, LiveManifest, LIVE_FORMAT, VERSION, "a memory in a directory")
    layers = manifest.layout.layers
    if not len(manifest.streams) == len(manifest.stores) > 0:
        raise MemoryFileError(
            f"{file}: there must be one store for each stream, got {len(manifest.stores)} and {len(manifest.streams)}"
        )
    for number, (stream, store) in enumerate(zip(manifest.streams, manifest.stores, strict=True)):
        for name, counts in (("stm", stream.stm), ("pending", stream.pending), ("ltm", stream.ltm)):
            if len(counts) != layers or min(counts, default=0) < 0:
                raise MemoryFileError(
                    f"{file}: streams[{number}].{name} must count the rows of {layers} layers, got {list(counts)}"
                )
        if len(store.next_ids) != layers:
            raise MemoryFileError(f"{file}: stores[{number}].next_ids must have {layers} entries")
    for name in manifest.files:
        if not OWN.fullmatch(name):
            raise MemoryFileError(f"{file} must name files like {STATE.format('<id>', '<n>')!r}, got {name!r}")
    return manifest
