"""FileSystem: everything that is done to files which have to outlive the process, one call each.

Tests put their own in its place: one that fails at a given call, one that forgets what was never synced.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from mplus.stores.disk.folder import FILE_MODE, Folder, PathAt, folder_mode, open_file, path_at

Bytes = bytes | bytearray | memoryview


class FileSystem:
    """The real one. Everything may raise OSError.

    What a file holds is on disk after ``sync``; that it exists under its name, or no longer does, after
    ``sync_folder``. Neither holds before.
    """

    def make_folder(self, path: Path, file_mode: int = FILE_MODE) -> None:
        """Create ``path`` and its parents where they are missing; afterwards they last.

        Those that are made can be looked into by whoever may read files of ``file_mode``; others stay as they are.
        """
        mode = folder_mode(file_mode)
        for folder in reversed([path, *(parent for parent in path.parents if not parent.exists())]):
            try:
                folder.mkdir(mode)
            except FileExistsError:
                if folder.is_dir():  # before, or somebody else has made it meanwhile
                    continue
                raise
            if mode & ~folder.stat().st_mode:
                folder.chmod(mode)  # the umask took away what was asked for
            self.sync_folder(folder.parent)

    def create(self, path: Path | PathAt) -> int:
        """A descriptor of a new, empty file; writing goes to its end. Raises FileExistsError where there is one."""
        return open_file(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_APPEND)

    def extend(self, path: Path | PathAt) -> int:
        """A descriptor of a file that exists; writing goes to its end."""
        return open_file(path, os.O_RDWR | os.O_APPEND)

    def write(self, handle: int, data: Bytes) -> None:
        """Write all of ``data`` at the end of a file."""
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

    def rename(self, source: Path | PathAt, target: Path | PathAt) -> None:
        """Give a file another name in its folder, in place of what had that name."""
        old, new = path_at(source), path_at(target)
        os.replace(old.where, new.where, src_dir_fd=old.dir_fd, dst_dir_fd=new.dir_fd)

    def remove(self, path: Path | PathAt) -> None:
        """Remove a file's name."""
        at = path_at(path)
        os.unlink(at.where, dir_fd=at.dir_fd)

    def sync_folder(self, folder: Path | Folder) -> None:
        """Make new, changed and removed names in ``folder`` last."""
        if isinstance(folder, Folder) and folder.handle is not None:
            _sync(folder.handle)
            return
        try:
            handle = os.open(str(folder), os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except PermissionError:  # Windows opens no folders, and sees to it itself
            if os.name == "nt":
                return
            raise
        try:
            _sync(handle)
        finally:
            os.close(handle)


def _sync(folder: int) -> None:
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that do not sync folders say so
            raise
