"""The lock of a directory: one writer at a time, for as long as its process lives."""

from __future__ import annotations

import os
from pathlib import Path

from mplus.errors import LiveMemoryError, NotSupported
from mplus.memory.durable.manifest import LOCK


def acquire(folder: Path) -> int:
    """Take the lock; returns a descriptor, which holds it until it is closed or the process ends.

    The process's id stands in the file for others to read; nothing depends on it.

    Raises:
        LiveMemoryError: somebody has it; says who.
        NotSupported: no such locks here.
        OSError: the file cannot be made.
    """
    try:
        import fcntl
    except ImportError as error:
        raise NotSupported("a memory in a directory needs flock, which this system does not have: save it") from error
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.read(handle, 64).decode("ascii", "replace").strip() or "unknown"
            raise LiveMemoryError(
                f"{folder} may be open for writing once, and is by process {owner}: close it there, or open it with "
                "read_only=True"
            ) from error
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
    except BaseException:
        os.close(handle)
        raise
    return handle
