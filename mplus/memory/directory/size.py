"""The bytes that a memory takes on disk, and in RAM once it is open, without opening it."""

from __future__ import annotations

import stat
from contextlib import suppress
from pathlib import Path

from attrs import define

from mplus.errors import MemoryFileError
from mplus.memory.directory.checkpoint_manifest import read_live_manifest
from mplus.memory.format.folder import hold
from mplus.memory.format.manifest import LIVE_FORMAT, is_memory, read_manifest
from mplus.stores.disk.files import Folder


@define(frozen=True)
class MemoryBytes:
    """The size of a memory.

    Attributes:
        disk: bytes of all files in its folder.
        ram: bytes that it takes in RAM when it is opened: short-term rows, sources, texts and what the journal adds.
            Long-term rows of a memory that lives in a directory stay in their files, which the system caches as it has
            room; those of a saved memory are read.
    """

    disk: int
    ram: int


def memory_bytes(path: str | Path) -> MemoryBytes:
    """Return the size of a memory on disk by its manifest and the sizes of its files; no row is read.

    Another process may be writing to it.

    Args:
        path: of the folder, as given to ``Memory.open`` or ``Memory.save``.

    Raises:
        MemoryFileError: there is no memory, or its manifest is damaged.

    Example:
        >>> mplus.memory_bytes("anna").disk  # doctest: +SKIP
        1048576
    """
    with hold(path) as folder:
        if is_memory(folder, LIVE_FORMAT):
            manifest = read_live_manifest(folder)
            journal = 0
            with suppress(OSError):  # a writer has replaced the checkpoint meanwhile, and begun an empty journal
                journal = (folder / manifest.journal).stat().st_size
            return MemoryBytes(_disk(folder), manifest.state.bytes + journal)
        return MemoryBytes(_disk(folder), read_manifest(folder).data.bytes)


def _disk(folder: Folder) -> int:
    """Return the bytes of all regular files in a folder. Raises MemoryFileError: it cannot be read."""
    total = 0
    try:
        for name in folder.names():
            try:
                facts = (folder / name).stat()
            except FileNotFoundError:  # a writer may be replacing its checkpoint
                continue
            total += facts.st_size if stat.S_ISREG(facts.st_mode) else 0
    except OSError as error:
        raise MemoryFileError(f"{folder} must be a readable folder, got {error.strerror or error}") from error
    return total
