"""The lock of a directory: one writer at a time, for as long as its process lives; and the memory's id.

The file ``lock`` says ``mplus-lock``, the id, and in a second line the process that has it. The id stands in the names
of all files of the memory's checkpoints, and is on disk before the first of them is made: so those that a crash has
left are known as the memory's own, and files of the same kind that are somebody else's are not taken for them.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
import time

from attrs import define

from mplus.errors import LiveMemoryError, NotSupported
from mplus.memory.directory.checkpoint_manifest import LOCK
from mplus.stores.disk.files import FileSystem, Folder, open_file
from mplus.stores.disk.locks import FileLock

LONGEST = 64
"""Bytes of the file; a longer one is somebody else's."""
FIRST_PAUSE, LONGEST_PAUSE = 0.001, 0.05
"""Seconds between two tries to get a lock that another has."""
CONTENT = re.compile(rb"(?:mplus-lock ([0-9a-f]{16})\n)?(\d*)\n?\x00*")
"""The file as this version, or earlier ones, write it; what was not synced may be missing, or zero."""


@define(eq=False)
class Lock:
    """The lock of a directory, held.

    Attributes:
        file: open.
        owner: the memory's id.
    """

    file: FileLock
    owner: str

    def fault(self, folder: Folder) -> str | None:
        """Return why another process could have locked ``folder`` meanwhile; None: none can."""
        try:
            named = (folder / LOCK).stat()
        except OSError as error:
            return f"its file {LOCK!r} is gone: {error.strerror or error}"
        if self.file.handle is None or not os.path.samestat(named, os.fstat(self.file.handle)):
            return f"its file {LOCK!r} is another one than was locked"
        return None


def acquire(files: FileSystem, folder: Folder, deadline: float = 0.0) -> Lock:
    """Take the lock, which is held until it is released or the process ends.

    Args:
        files: does it.
        folder: the memory's.
        deadline: until when to wait for it, by ``time.monotonic``.

    Raises:
        LiveMemoryError: another has it, in this process or elsewhere; says which process.
        NotSupported: no such locks here.
        OSError: the file cannot be made, or is not one that mplus has made.
    """
    try:
        import fcntl  # noqa: F401 - whether it is there
    except ImportError as error:
        raise NotSupported("a memory in a directory needs flock, which this system does not have: save it") from error
    file = FileLock(lambda: _opened(files, folder))
    try:
        handle = file.opened()
        _take(file, folder, deadline)
        return Lock(file, _signed(files, folder, handle))
    except BaseException:
        file.release()
        raise


def _take(file: FileLock, folder: Folder, deadline: float) -> None:
    """Lock the file, and try again until the deadline where another has it. Raises LiveMemoryError then."""
    pause = FIRST_PAUSE
    while True:
        try:
            file.take(wait=False)  # not a wait in the system: that one neither ends in time nor hears an interrupt
            return
        except BlockingIOError as error:
            left = deadline - time.monotonic()
            if left <= 0:
                found = CONTENT.fullmatch(_read(file.opened()))
                process = found[2].decode() if found and found[2] else "unknown"
                raise LiveMemoryError(
                    f"{folder} may be open for writing once, and is by process {process}: close it there, or open it "
                    "with read_only=True"
                ) from error
        time.sleep(min(pause, left))
        pause = min(2 * pause, LONGEST_PAUSE)


def _opened(files: FileSystem, folder: Folder) -> int:
    path = folder / LOCK
    if not path.exists():
        try:
            return files.create(path)
        except FileExistsError:  # somebody was faster
            pass
    return files.extend(path)


def _read(handle: int) -> bytes:
    return os.pread(handle, LONGEST + 1, 0)


def _is_begun(content: bytes) -> bool:
    """Return True for nothing, or the beginning of the first line: a crash came before the id was on disk."""
    begun = content.rstrip(b"\0")
    return b"mplus-lock ".startswith(begun) or re.fullmatch(rb"mplus-lock [0-9a-f]{0,16}", begun) is not None


def owner_of(folder: Folder) -> tuple[str | None, bool]:
    """Return the memory's id, and whether it is still to get one.

    The id is None where there is no lock of a memory, or one without an id. A memory is to get one where there is no
    lock, or one that a crash has left before the id was on disk.
    """
    path = folder / LOCK
    if not path.exists():
        return None, True
    if not stat.S_ISREG(path.stat().st_mode):
        return None, False
    handle = open_file(path)
    try:
        content = _read(handle)
    finally:
        os.close(handle)
    found = CONTENT.fullmatch(content)
    return found[1].decode() if found and found[1] else None, _is_begun(content)


def _signed(files: FileSystem, folder: Folder, handle: int) -> str:
    """Write the process into the file, and before that an id where there is none; returns the id."""
    content = _read(handle)
    found = CONTENT.fullmatch(content)
    if len(content) > LONGEST or not (found or _is_begun(content)):
        raise OSError(f"{folder / LOCK} must be a lock that mplus has made, and holds something else")
    owner = found[1].decode() if found and found[1] else None
    if owner is None:
        owner = secrets.token_hex(8)
        files.truncate(handle, 0)
        files.write(handle, f"mplus-lock {owner}\n".encode())
        files.sync(handle)
        files.sync_folder(folder)
    else:
        files.truncate(handle, len(f"mplus-lock {owner}\n"))
    files.write(handle, f"{os.getpid()}\n".encode())
    return owner
