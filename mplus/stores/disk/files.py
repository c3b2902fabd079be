"""Files that have to outlive the process: folders that are held open, paths relative to them, and a file system.

A ``Folder`` is a directory that is held open; paths are relative to it, as POSIX ``openat`` takes them.
A path can come to mean another directory: the working directory changes, a folder is renamed, a link is set anew. A
descriptor stays with the directory it was opened on. And a file in a directory that came from elsewhere may be a link
to a file of somebody else, or a pipe that nobody writes to: what is opened here is a regular file, never through a
link.
"""

from __future__ import annotations

import errno
import os
import stat
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from attrs import Attribute, define, field

from mplus.errors import MemoryFileError

FILE_MODE = 0o600
"""Permission bits of files unless a caller asks to share them: their owner's alone."""

AT = os.open in os.supports_dir_fd
"""Whether the system opens files relative to a directory (Windows does not: absolute paths stand in there)."""
NEVER_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
PLAIN = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOCTTY", 0) | NEVER_FOLLOW
NO_WAIT = getattr(os, "O_NONBLOCK", 0)
"""Opening a pipe returns at once, and so does nothing else than it would for a regular file."""

Bytes = bytes | bytearray | memoryview


class Folder:
    """A directory, whatever its path comes to mean; a context manager that gives it back.

    Attributes:
        path: absolute, as it was when the folder was opened.
        file_mode: permission bits of files that are made in it.
    """

    def __init__(self, path: Path, handle: int | None, file_mode: int = FILE_MODE) -> None:
        self.path, self.handle, self.file_mode = path, handle, file_mode
        self._finalizer = None if handle is None else weakref.finalize(self, os.close, handle)

    @classmethod
    def open(cls, path: str | Path, file_mode: int = FILE_MODE) -> Folder:
        """Open an existing directory; ``path`` itself may be a link. Raises OSError: there is none."""
        path = Path(path).absolute()  # no more than that: ".." behind a link is another place than its text says
        if not AT:
            if not path.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
            return cls(path, None, file_mode)
        return cls(path, os.open(path, os.O_RDONLY | os.O_DIRECTORY | getattr(os, "O_CLOEXEC", 0)), file_mode)

    def __truediv__(self, name: str) -> PathAt:
        return PathAt(self, name)

    def __str__(self) -> str:
        return str(self.path)

    def names(self) -> list[str]:
        """List the names in it, sorted. Raises OSError."""
        return sorted(os.listdir(self.path if self.handle is None else self.handle))  # noqa: PTH208 - of a descriptor

    def is_at_its_path(self) -> bool:
        """Return True if the path still leads to this directory."""
        if self.handle is None:
            return self.path.is_dir()
        try:
            return os.path.samestat(self.path.stat(), os.fstat(self.handle))
        except OSError:
            return False

    def close(self) -> None:
        """Give the descriptor back, as happens where nobody refers to the folder any more; idempotent."""
        self.handle = None
        if self._finalizer is not None:
            self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@define(frozen=True, eq=False)
class PathAt:
    """A name in a folder; ``os.fspath`` gives the absolute path it had when the folder was opened."""

    folder: Folder
    name: str = field()

    @name.validator
    def _check(self, attribute: Attribute[str], name: str) -> None:
        if name in {"", ".", ".."} or Path(name).name != name:
            raise ValueError(f"a file must have a plain name, got {name!r}")

    @property
    def parent(self) -> Path:
        """The folder's path."""
        return self.folder.path

    def __fspath__(self) -> str:
        return str(self.folder.path / self.name)

    def __str__(self) -> str:
        return os.fspath(self)

    @property
    def where(self) -> str:
        """The path that functions of ``os`` take together with ``dir_fd``."""
        return os.fspath(self) if self.folder.handle is None else self.name

    @property
    def dir_fd(self) -> int | None:
        """The folder's descriptor; None: ``where`` is the whole path."""
        return self.folder.handle

    def stat(self) -> os.stat_result:
        """Return the status of the name itself, where it is a link of the link. Raises OSError."""
        return os.stat(self.where, dir_fd=self.dir_fd, follow_symlinks=False)

    def exists(self) -> bool:
        """Return True if there is such a name, be it a link that leads nowhere."""
        try:
            self.stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True


def path_at(path: Path | PathAt) -> PathAt:
    """Return ``path`` relative to a folder: one that nobody holds, where it is an ordinary path."""
    return path if isinstance(path, PathAt) else PathAt(Folder(path.absolute().parent, None), path.name)


def open_file(path: Path | PathAt, flags: int = os.O_RDONLY) -> int:
    """Return a descriptor of a regular file. ``flags`` may create it, with the permission bits of its folder.

    Raises:
        OSError: as ``os.open``; it is a link, a pipe, a device or a folder; or it is to be written to and has other
            names (hard links), under which somebody else may know it.
    """
    at = path_at(path)
    wanted = at.folder.file_mode
    if not NEVER_FOLLOW:  # the system cannot refuse a link as it opens it
        _check_no_link(at)
    try:
        handle = os.open(at.where, flags | PLAIN | NO_WAIT, wanted, dir_fd=at.dir_fd)
    except FileNotFoundError as error:
        raise FileNotFoundError(error.errno, error.strerror, str(at)) from error
    except OSError as error:
        _check_no_link(at)  # which error a link gives differs from system to system
        raise OSError(error.errno, error.strerror, str(at)) from error
    try:
        facts = os.fstat(handle)
        _check_plain(at, facts, writing=bool(flags & (os.O_WRONLY | os.O_RDWR)))
        if flags & os.O_EXCL and wanted & ~stat.S_IMODE(facts.st_mode):
            os.fchmod(handle, wanted)  # the umask took away what was asked for
    except BaseException:
        os.close(handle)
        raise
    return handle


def _check_no_link(at: PathAt) -> None:
    if at.exists() and stat.S_ISLNK(at.stat().st_mode):
        raise OSError(errno.ELOOP, "a symbolic link, and links are not followed", str(at))


def _check_plain(at: PathAt, facts: os.stat_result, *, writing: bool) -> None:
    if not stat.S_ISREG(facts.st_mode):
        raise OSError(errno.EINVAL, "something else than a regular file", str(at))
    if writing and facts.st_nlink > 1:
        raise OSError(errno.EMLINK, f"a file with {facts.st_nlink} names, which would all be written to", str(at))


def read_file(path: Path | PathAt) -> bytes:
    """Return all of a regular file. Raises OSError as ``open_file``."""
    with os.fdopen(open_file(path), "rb") as file:
        return file.read()


def path_of(handle: int, path: Path | PathAt) -> str:
    """Return a path to the open file ``handle``, for libraries that take nothing else; ``path``: where it was opened.

    Where the system has no paths to open files, it is looked for at ``path`` again. Raises OSError: it went.
    """
    for folder in ("/proc/self/fd", "/dev/fd"):
        if Path(folder, str(handle)).exists():
            return f"{folder}/{handle}"
    if not os.path.samestat(path_at(path).stat(), os.fstat(handle)):
        raise OSError(errno.ESTALE, "another file, put there meanwhile", str(path))
    return os.fspath(path)


@contextmanager
def writable(folder: Path | Folder) -> Iterator[None]:
    """Turn what the operating system refuses into MemoryFileError."""
    try:
        yield
    except OSError as error:
        raise MemoryFileError(
            f"{folder} must be a folder that can be written, got {error.strerror or error}"
            f"{f' for {error.filename}' if error.filename else ''}: choose another path, or make room and allow writing"
        ) from error


# ---------------------------------------------------------------------- changing files


class FileSystem:
    """Everything that is done to files which have to outlive the process, one call each. All may raise OSError.

    Tests put their own in its place: one that fails at a given call, one that forgets what was never synced.

    What a file holds is on disk after ``sync``; that it exists under its name, or no longer does, after
    ``sync_folder``. Neither holds before.
    """

    def make_folder(self, path: Path, file_mode: int = FILE_MODE) -> None:
        """Create ``path`` and its parents where they are missing; afterwards they last.

        Those that are made can be looked into by whoever may read files of ``file_mode``; others stay as they are.
        """
        mode = file_mode | (file_mode & 0o444) >> 2  # who may read files may look them up: 0o640 -> 0o750
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
        """Return a descriptor of a new file; writing goes to its end. Raises FileExistsError where there is one."""
        return open_file(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_APPEND)

    def extend(self, path: Path | PathAt) -> int:
        """Return a descriptor of a file that exists; writing goes to its end."""
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

    def remove_folder(self, path: PathAt) -> None:
        """Remove an empty folder."""
        os.rmdir(path.where, dir_fd=path.dir_fd)

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
