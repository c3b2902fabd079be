"""Make the directory of a memory wholly, or not at all: beside its place first, and then put there in one step."""

from __future__ import annotations

import errno
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mplus.errors import MemoryFileError
from mplus.memory.directory.removal import NEW, remove_folder
from mplus.stores.disk.files import FileSystem, Folder, writable


@contextmanager
def new_directory(path: Path, files: FileSystem | None = None) -> Iterator[Path]:
    """Yield a path to make a memory at, close it there, and have it at ``path`` afterwards, on disk.

    What a crash leaves beside ``path`` is removed by ``remove_deleted``.

    Args:
        path: of the directory; not there yet, or empty.
        files: does what is done to files; None: the system.

    Raises:
        MemoryFileError: there is something at ``path``, or it cannot be made. Nothing is left then.
    """
    files, path = files or FileSystem(), path.absolute()
    with writable(path.parent):
        if "\0" in str(path):
            raise OSError(errno.EINVAL, "a null character in its path")
        files.make_folder(path.parent)
        _check_free(path)
        with Folder.open(path.parent) as parent:
            made = parent / NEW.format(secrets.token_hex(8))
            try:
                yield path.parent / made.name
                _check_free(path)
                files.sync_folder(path.parent / made.name)
                files.rename(made, parent / path.name)
                files.sync_folder(parent)
            except BaseException:
                remove_folder(files, parent, made.name)
                raise


def _check_free(path: Path) -> None:
    if path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
        raise MemoryFileError(f"{path} must be a new path, or an empty folder, and something is there: choose another")
