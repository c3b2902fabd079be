"""A folder that holds one save: a manifest and a data file, replaced together or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from mplus.errors import MemoryFileError
from mplus.stores.disk.filesystem import FileSystem

MANIFEST = "manifest.json"
DATA = "rows-{}.safetensors"
TEMPORARY = ".mplus-{}.tmp"


def lock(folder: Path, *, shared: bool = False) -> int:
    """Keep other threads and processes from saving into ``folder`` meanwhile, where the file system can lock.

    ``shared``: others may read at the same time. The lock ends with the process, so a crash leaves none behind.

    Returns:
        A descriptor to ``os.close`` in a ``finally`` of the same function: an interrupt on the way into a context
        manager's exit would leave the folder locked.
    """
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):  # no such locks here, or no folder: whoever opens its files will say so
        return os.open(os.devnull, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
    except BaseException:
        os.close(handle)
        raise
    return handle


@contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Turn what the operating system refuses into MemoryFileError."""
    try:
        yield
    except OSError as error:
        raise MemoryFileError(
            f"{folder} must be a folder that can be written, got {error.strerror or error}"
            f"{f' for {error.filename}' if error.filename else ''}: choose another path, or make room and allow writing"
        ) from error


def prepare(folder: Path) -> None:
    """Create ``folder`` and its parents.

    Raises:
        MemoryFileError: it is a file, or cannot be created.
    """
    if folder.exists() and not folder.is_dir():
        raise MemoryFileError(f"{folder} must be a folder, or not exist yet, to save a memory in; it is a file")
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    with writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for path in reversed(missing):
            FileSystem().sync_folder(path.parent)


def check_free(folder: Path, is_memory: bool) -> None:
    """Raise MemoryFileError unless ``folder`` holds nothing, a memory, or what an interrupted save left there."""
    if is_memory:
        return
    foreign = sorted(entry.name for entry in folder.iterdir() if not _is_leftover(entry))
    if foreign:
        raise MemoryFileError(
            f"{folder} must be empty or hold a saved memory, got a folder with {', '.join(map(repr, foreign[:3]))}"
            f"{', ...' if len(foreign) > 3 else ''}: choose another path, or empty it"
        )


@contextmanager
def temporary(folder: Path) -> Iterator[Path]:
    """A name in ``folder`` for a file that is being written; what has not been renamed by the end is removed."""
    path = folder / TEMPORARY.format(secrets.token_hex(8))
    try:
        yield path
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def flush(file: BinaryIO) -> None:
    """Wait until the contents of ``file`` are on disk."""
    file.flush()
    os.fsync(file.fileno())


def rename(path: Path, name: str) -> None:
    """Give a file another name in its folder, in place of what had that name; afterwards the change is on disk."""
    path.replace(path.with_name(name))
    FileSystem().sync_folder(path.parent)


def remove_others(folder: Path, data: str) -> None:
    """Remove data files of older saves and what interrupted ones left; a file still in use somewhere may stay."""
    for entry in folder.iterdir():
        if _is_leftover(entry) and entry.name != data:
            with suppress(OSError):
                entry.unlink()


def _is_leftover(entry: Path) -> bool:
    return entry.match(DATA.format("*")) or entry.match(TEMPORARY.format("*"))
