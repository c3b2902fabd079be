"""ProcessLock: a lock between the threads of a process that a forked child finds free."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any


class ProcessLock:
    """A lock of its own for every process: the threads that held one in the parent do not exist in a child.

    Used as ``with lock.here(): ...``, so that what is entered and left is an ordinary lock, which no interrupt catches
    half way.
    """

    def __init__(self, make: Callable[[], Any] = threading.Lock) -> None:
        """``make``: gives a lock, ``threading.Lock`` or ``threading.RLock``."""
        self._make = make
        self._locks: dict[int, Any] = {os.getpid(): make()}

    def here(self) -> Any:
        """The lock of this process."""
        process = os.getpid()
        lock = self._locks.get(process)
        return self._locks.setdefault(process, self._make()) if lock is None else lock

    @property
    def is_new(self) -> bool:
        """Whether this is a child in which nobody has asked for the lock yet."""
        return os.getpid() not in self._locks
