"""A folder that holds one save: a manifest and a data file, replaced together or not at all."""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from mplus.errors import ConfigError, MemoryFileError
from mplus.stores.disk.files import FILE_MODE, FileSystem, Folder, PathAt, writable
from mplus.stores.disk.locks import FileLock

MANIFEST = "manifest.json"
DATA = "rows-{}.safetensors"
TEMPORARY = ".mplus-{}.tmp"
TEMPORARY_NAME = re.compile(r"\.mplus-[0-9a-f]{16}\.tmp")


def lock(folder: Folder, *, shared: bool = False) -> FileLock:
    """Lock ``folder`` against saves by other threads and processes, where the file system can.

    ``shared``: others may read at the same time. The lock ends with the process, so a crash leaves none behind.

    Returns:
        A lock to ``release`` in a ``finally`` of the same function: an interrupt on the way into a context manager's
        exit would leave the folder locked.
    """
    held = FileLock(lambda: os.open(os.devnull if folder.handle is None else ".", os.O_RDONLY, dir_fd=folder.handle))
    with suppress(ImportError, OSError):  # no such locks here
        held.take(shared=shared)
    return held


def hold(path: str | Path) -> Folder:
    """Open the folder of a memory. Raises MemoryFileError: there is none."""
    path = Path(path)
    try:
        return Folder.open(path)
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        missing = isinstance(error, OSError) and error.errno in {errno.ENOENT, errno.ENOTDIR}
        fault = "is missing" if missing else f"must be readable, got {error}"
        raise MemoryFileError(f"{path / MANIFEST} {fault}: {path} must be a folder written by Memory.save") from error


def prepare(path: Path, file_mode: int | None = None, files: FileSystem | None = None, purpose: str = "save") -> Folder:
    """Create the folder ``path`` and its parents, and open it.

    Args:
        path: of the folder.
        file_mode: permission bits of files that are made in it; folders that are made can be looked into accordingly.
            None: those of the memory that is there, else its owner's alone.
        files: does it.
        purpose: what is done with a memory there.

    Raises:
        MemoryFileError: it is a file, or cannot be created.
        ConfigError: ``file_mode`` is none.
    """
    wanted = FILE_MODE if file_mode is None else file_mode
    if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted & ~0o066 != FILE_MODE:
        raise ConfigError(
            "file_mode must be permission bits that let the owner read and write and nobody execute, 0o600 to 0o666, "
            f"got {oct(wanted) if isinstance(wanted, int) else repr(wanted)}"
        )
    with writable(path):
        if "\0" in str(path):
            raise OSError(errno.EINVAL, "a null character in its path")
        if path.exists() and not path.is_dir():
            raise MemoryFileError(f"{path} must be a folder, or not exist yet, to {purpose} a memory in; it is a file")
        path = path.absolute()
        (files or FileSystem()).make_folder(path, wanted)
        folder = Folder.open(path, wanted)
        if file_mode is None and (folder / MANIFEST).exists():
            folder.file_mode |= mode_of(folder / MANIFEST)
        return folder


def mode_of(path: PathAt) -> int:
    """Return the permission bits of a file, for the one that takes its place. Raises MemoryFileError: it is gone."""
    with writable(path.folder):
        return path.stat().st_mode & 0o666


def check_free(folder: Folder, is_memory: bool, leftovers: Collection[str]) -> None:
    """Raise MemoryFileError unless ``folder`` holds nothing, a memory, or what an interrupted save left there."""
    if is_memory:
        return
    foreign = [name for name in folder.names() if name not in leftovers]
    if foreign:
        raise MemoryFileError(
            f"{folder} must be empty or hold a saved memory, got a folder with {', '.join(map(repr, foreign[:3]))}"
            f"{', ...' if len(foreign) > 3 else ''}: choose another path, or empty it"
        )


@contextmanager
def temporary(folder: Folder) -> Iterator[PathAt]:
    """Yield a name in ``folder`` for a file that is written; remove the file in the end unless it was renamed."""
    path = folder / TEMPORARY.format(secrets.token_hex(8))
    try:
        yield path
    finally:
        with suppress(OSError):
            FileSystem().remove(path)


def create(path: PathAt) -> BinaryIO:
    """Open a new file for writing."""
    return os.fdopen(FileSystem().create(path), "wb")


def flush(file: BinaryIO) -> None:
    """Wait until the contents of ``file`` are on disk."""
    file.flush()
    os.fsync(file.fileno())


def rename(path: PathAt, name: str) -> None:
    """Give a file another name in its folder, in place of what had that name; afterwards the change is on disk."""
    FileSystem().rename(path, path.folder / name)
    FileSystem().sync_folder(path.folder)


def remove(folder: Folder, names: Collection[str]) -> list[str]:
    """Remove files that are there; returns the names of those that could not be removed."""
    left = []
    for name in sorted(set(names) & set(folder.names())):
        try:
            FileSystem().remove(folder / name)
        except FileNotFoundError:
            continue
        except OSError:
            left.append(name)
    return left


def check_removed(folder: Path | Folder, left: Sequence[str]) -> None:
    """Raise MemoryFileError where files ``left`` of an earlier state of a memory still hold what it has forgotten."""
    if left:
        raise MemoryFileError(
            f"{folder}: the memory has forgotten what it was to forget, but {', '.join(left)} could not be removed and "
            "may still hold it: remove what is left there"
        )
