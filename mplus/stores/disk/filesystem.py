"""FileSystem: everything that is done to files which have to outlive the process, one call each.

Tests put their own in its place: one that fails at a given call, one that forgets what was never synced.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

Bytes = bytes | bytearray | memoryview


class FileSystem:
    """The real one. Everything may raise OSError.

    What a file holds is on disk after ``sync``; that it exists under its name, or no longer does, after
    ``sync_folder``. Neither holds before.
    """

    def make_folder(self, path: Path) -> None:
        """Create ``path`` and its parents where they are missing; afterwards they last."""
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for folder in reversed(missing):
            self.sync_folder(folder.parent)

    def create(self, path: Path) -> int:
        """A descriptor of a new, empty file. Raises FileExistsError where there is one."""
        return os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_CLOEXEC", 0), 0o666)

    def extend(self, path: Path) -> int:
        """A descriptor of a file that exists; writing goes to its end."""
        return os.open(path, os.O_RDWR | os.O_APPEND | getattr(os, "O_CLOEXEC", 0))

    def write(self, handle: int, data: Bytes) -> None:
        """Write all of ``data`` behind what was written."""
        rest = memoryview(data).cast("B") if len(data) else memoryview(b"")
        while len(rest):
            rest = rest[self.write_some(handle, rest) :]

    def write_some(self, handle: int, data: memoryview) -> int:
        """Write some of ``data``, at least a byte; returns how much."""
        written = os.write(handle, data)
        if written == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return written

    def truncate(self, handle: int, size: int) -> None:
        """Cut a file to its first ``size`` bytes."""
        os.ftruncate(handle, size)

    def sync(self, handle: int) -> None:
        """Wait until what was written to a file is on disk."""
        os.fsync(handle)

    def close(self, handle: int) -> None:
        """Give a descriptor back."""
        os.close(handle)

    def rename(self, source: Path, target: Path) -> None:
        """Give a file another name in its folder, in place of what had that name."""
        source.replace(target)

    def remove(self, path: Path) -> None:
        """Remove a file's name."""
        path.unlink()

    def sync_folder(self, folder: Path) -> None:
        """Make new, changed and removed names in ``folder`` last."""
        try:
            handle = os.open(folder, os.O_RDONLY)
        except PermissionError:  # Windows opens no folders, and sees to it itself
            if os.name == "nt":
                return
            raise
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that do not sync folders say so
                raise
        finally:
            os.close(handle)
