"""Locks that a forked child finds free: between the threads of a process, and between processes, on a file."""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager


class ProcessLock:
    """A lock of its own for every process: the threads that held one in the parent do not exist in a child.

    Used as ``with lock.here(): ...``, so that what is entered and left is an ordinary lock, which no interrupt catches
    half way.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[bool]] = threading.Lock) -> None:
        """``make``: gives a lock, ``threading.Lock`` or ``threading.RLock``."""
        self._make = make
        self._locks: dict[int, AbstractContextManager[bool]] = {os.getpid(): make()}

    def here(self) -> AbstractContextManager[bool]:
        """Return the lock of this process."""
        process = os.getpid()
        lock = self._locks.get(process)
        return self._locks.setdefault(process, self._make()) if lock is None else lock

    @property
    def is_new(self) -> bool:
        """True in a child in which nobody has asked for the lock yet."""
        return os.getpid() not in self._locks


class FileLock:
    """An open file to take an ``flock`` on.

    Such a lock belongs to the open file, which a forked child shares: it would hold for as long as the child lives, be
    it a worker that a DataLoader made. So releasing says so to the system instead of only closing the file, and a child
    closes what it shares as it begins. Where nobody refers to the lock any more, it is released.

    Attributes:
        handle: descriptor; None: released, or this is a child of the process that opened it.
    """

    def __init__(self, open_file: Callable[[], int]) -> None:
        """``open_file`` opens it; no other thread forks meanwhile."""
        self.handle: int | None = None
        guard, held = _held()
        with guard:
            held.add(self)
            self.handle = open_file()

    def take(self, *, shared: bool = False, wait: bool = True) -> None:
        """Lock the file. Raises BlockingIOError: held elsewhere, and this does not wait; OSError: no locks here."""
        import fcntl

        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        fcntl.flock(self.opened(), kind if wait else kind | fcntl.LOCK_NB)

    def opened(self) -> int:
        """Return the descriptor. Raises ValueError: it was closed."""
        if self.handle is None:
            raise ValueError("the file of a lock was closed")
        return self.handle

    def release(self) -> None:
        """Unlock and close the file; idempotent."""
        handle, self.handle = self.handle, None
        if handle is None:
            return
        try:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_UN)
        except (ImportError, OSError):  # no such locks here: there was none to be released
            pass
        finally:
            os.close(handle)

    def leave_to_parent(self) -> None:
        """In a child: close the file, whose lock is its parent's."""
        handle, self.handle = self.handle, None
        if handle is not None:
            os.close(handle)

    def __del__(self) -> None:
        self.release()


@functools.cache
def _held() -> tuple[threading.RLock, weakref.WeakSet[FileLock]]:
    """Return the locks of this process, and what keeps it from forking while one is opened; made with the first lock.

    What happens when a process forks is a matter of the process, so that this cannot belong to one memory: what the
    interpreter is once told to do at a fork, it does for ever.
    """
    guard, held = threading.RLock(), weakref.WeakSet[FileLock]()

    def leave() -> None:
        for lock in list(held):
            lock.leave_to_parent()
        guard.release()

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=guard.acquire, after_in_parent=guard.release, after_in_child=leave)
    return guard, held
