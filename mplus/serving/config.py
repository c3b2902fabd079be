"""ServeConfig: what ``mplus serve`` is told."""

from __future__ import annotations

from pathlib import Path

from attrs import define, field

from mplus.config import whole


@define(frozen=True, kw_only=True)
class Limits:
    """Limits that keep one user from the others' places.

    Attributes:
        body_bytes: of a request but for imports.
        waiting: requests of one tenant that may wait.
        memories: of one tenant; None: no limit.
        memory_bytes: of one memory in RAM and files (``bytes_budget``); None: as the decoder's config says.
        disk_bytes: of all memories of one tenant; None: no limit.
    """

    body_bytes: int = field(default=32 * 2**20, validator=whole(1))
    waiting: int = field(default=32, validator=whole(1))
    memories: int | None = field(default=None, validator=whole(1, optional=True))
    memory_bytes: int | None = field(default=None, validator=whole(2**10, optional=True))
    disk_bytes: int | None = field(default=None, validator=whole(2**10, optional=True))


@define(frozen=True, kw_only=True)
class ServeConfig:
    """Settings of a server.

    Attributes:
        memories: the folder that all memories live in.
        max_batch: answers that are generated at once.
        open_memories: memories that are kept open at most; each takes two file descriptors.
        ram_bytes: of all open memories; None: no limit.
        lock_seconds: that opening a memory waits for another process to close it.
        turn_seconds: that a turn of the loop aims at most at: the gap that a stream sees while others are read.
        limits: per tenant and request.
    """

    memories: Path
    max_batch: int = field(default=32, validator=whole(1))
    open_memories: int = field(default=256, validator=whole(1))
    ram_bytes: int | None = field(default=None, validator=whole(1, optional=True))
    lock_seconds: float = 3.0
    turn_seconds: float = 0.05
    limits: Limits = field(factory=Limits)
