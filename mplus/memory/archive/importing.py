"""Read an exported memory: into a spool first, where all of it is checked, and then into a memory, as one change."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import attrs
from attrs import define

from mplus.config import Component
from mplus.errors import InputError, MemoryFileError, MemoryFullError, MemoryMismatchError
from mplus.memory.archive.tar import SUMS, ArchiveReader, Origin, sums_of
from mplus.memory.directory.checkpoint_manifest import NEW_MANIFEST, ROWS
from mplus.memory.format.folder import MANIFEST
from mplus.memory.format.load import streams_of
from mplus.memory.format.manifest import Manifest, check_belongs, read_manifest
from mplus.memory.format.tensors import TensorReader
from mplus.memory.format.verify import data_faults
from mplus.memory.recompute import keeps_chunks
from mplus.memory.sources.expiry import expire
from mplus.memory.state import StreamState
from mplus.memory.transaction import Streams
from mplus.memory.writing.free import DISK_MARGIN, free_disk
from mplus.stores.disk.files import FileSystem, Folder, writable
from mplus.stores.stack import component_of

DATA_NAME = r"rows-[0-9a-f]{32}\.safetensors"
LONGEST_MANIFEST = 2**25
"""Bytes; a stream that claims more is not believed."""


@define(eq=False)
class Spool:
    """Files of a memory that is being read, in a folder whose owner removes what a crash leaves of them.

    Attributes:
        folder: it.
        files: does what is done to them.
        data, manifest: their names.
    """

    folder: Folder
    files: FileSystem
    data: str
    manifest: str


def import_streams(
    streams: Streams, file: str | Path | Origin, max_bytes: int | None, *, any_batch: bool = False
) -> None:
    """Let streams without content become what was exported; see ``Memory.import_``.

    ``any_batch``: there may be another number of them.
    """
    if max_bytes is not None and (isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 0):
        raise InputError(f"max_bytes must be a whole number of at least 0, got {max_bytes!r}")
    if not isinstance(file, str | os.PathLike):
        if not callable(getattr(file, "read", None)):
            raise InputError(f"file must be a path or a binary file to read from, got {type(file).__name__}")
        _import(streams, ArchiveReader(file, "the stream", max_bytes), any_batch)
        return
    with _opened(Path(file)) as opened:
        _import(streams, ArchiveReader(opened, str(file), max_bytes), any_batch)


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        raise MemoryFileError(f"{path} must be a readable file, got {error}") from error


def is_empty(streams: Streams) -> bool:
    """Return True if nothing was written to any of the streams, or all of it was reset."""
    _, views = streams.versioned_snapshot()
    for view in views:
        state, store = view.state, view.store
        if len(state.sources) or state.tail or len(state.writes) or any(map(store.count, range(store.layout.layers))):
            return False
        if state.clock != streams.engine.new_state(store.layout).clock:
            return False
    return True


def _import(streams: Streams, reader: ArchiveReader, any_batch: bool) -> None:
    with streams.write_lock:
        streams.check_writable()
        if not is_empty(streams):
            raise InputError("a memory is imported into an empty one, and this one has content: reset it, or make one")
        with _spool(streams) as spool:
            found = _checked(spool, reader, streams, any_batch)

            def become(states: list[StreamState]) -> None:
                states[:] = found.states
                streams.adopt(found)

            streams.change(become)
            if streams.budget.bytes is not None:  # rows may take another room than those of a new memory
                streams.budget = found.budget
        expire(streams)


@contextmanager
def _spool(streams: Streams) -> Iterator[Spool]:
    """Yield names for what is read: in the memory's own folder, under its own id, or in a temporary one."""
    directory = streams.persistence.directory
    if directory is None:
        with tempfile.TemporaryDirectory(prefix="mplus-import-") as made, Folder.open(made) as folder:
            yield Spool(folder, FileSystem(), "data", "manifest")
        return
    data, manifest = ROWS.format(directory.owner, secrets.token_hex(8)), NEW_MANIFEST.format(directory.owner)
    try:
        yield Spool(directory.folder, directory.files, data, manifest)
    finally:
        for name in (data, manifest):
            with suppress(OSError):  # what cannot be removed goes when the memory is opened
                if (directory.folder / name).exists():  # the checkpoint of a memory that was taken has removed it
                    directory.files.remove(directory.folder / name)


def _checked(spool: Spool, reader: ArchiveReader, streams: Streams, any_batch: bool) -> Streams:
    """Read everything, check all there is to check, and return the streams that it holds.

    Raises as ``Memory.import_``.
    """
    manifest = _spooled(spool, reader)
    engine = streams.engine
    facts = engine.fingerprint(manifest.fingerprint)
    check_belongs(manifest, facts, engine.layout, reader.where, any_weights=keeps_chunks(engine))
    if not any_batch and len(manifest.streams) != len(streams):
        raise MemoryMismatchError(
            f"{reader.where} must have the batch size of the memory, {len(streams)}, got {len(manifest.streams)}"
        )
    with TensorReader(spool.folder, manifest.data, spool.data) as opened:
        faults = data_faults(manifest, opened)
        if faults:
            raise MemoryFileError(f"{reader.where} must hold a sound memory, but {faults[0]}")
        policy, kind = streams.eviction, component_of(streams.stores[0])
        eviction, budget = Component(policy.name, attrs.asdict(policy.options)), streams.budget.bytes
        return streams_of(manifest, opened, reader.where, engine, kind, eviction, budget, streams.device, streams.clock)


def _spooled(spool: Spool, reader: ArchiveReader) -> Manifest:
    """Write what is read to the spool, and return its manifest. Raises MemoryFileError: it is not what was exported."""
    with writable(spool.folder):
        name, size = reader.member(DATA_NAME)
        free = free_disk(spool.folder.path)
        if 2 * size + DISK_MARGIN > free:  # once here, and once as rows of the memory
            raise MemoryFullError(
                f"the disk of {spool.folder} must have {2 * size + DISK_MARGIN:,} bytes free for {size:,} to be "
                f"imported, got {free:,}; nothing was taken: make room there"
            )
        digests = {name: _copied(spool, spool.data, reader, size)}
        _, length = reader.member(MANIFEST.replace(".", r"\."), LONGEST_MANIFEST)
        digests[MANIFEST] = _copied(spool, spool.manifest, reader, length)
        expected, found = sums_of(digests), bytearray()
        reader.copy(reader.member(SUMS, len(expected))[1], found.extend)
        reader.end()
    if found != expected:
        raise MemoryFileError(
            f"{reader.where} must have the digests {expected.decode()!r}, got {bytes(found)!r}: it was altered"
        )
    manifest = read_manifest(spool.folder, spool.manifest)
    data = manifest.data
    if (data.file, data.bytes, data.sha256) != (name, size, digests[name]):
        raise MemoryFileError(f"{reader.where} must hold the file that its manifest names: it was altered")
    return manifest


def _copied(spool: Spool, name: str, reader: ArchiveReader, size: int) -> str:
    """Write a member to a new file of the spool; return its SHA-256."""
    handle = spool.files.create(spool.folder / name)
    try:
        return reader.copy(size, lambda piece: spool.files.write(handle, piece))
    finally:
        spool.files.close(handle)
