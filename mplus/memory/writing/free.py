"""What is free of RAM and disk: looked at before a write, which must not die of either in the middle."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from mplus.errors import MemoryFullError
from mplus.memory.transaction import Streams
from mplus.memory.writing.plan import StreamWrite

RAM_MARGIN, DISK_MARGIN = 2**28, 2**26
"""Bytes that must be left, for what else the process does; on disk also for the table and the manifest."""
CGROUP = Path("/sys/fs/cgroup")
"""Where a container's own limit stands on Linux."""


def check_free(
    streams: Streams, writes: Sequence[StreamWrite], left: dict[torch.device, int | None] | None = None
) -> None:
    """Raise MemoryFullError where RAM, or the disk of a memory in a directory, has no room for what is to be written.

    Args:
        streams: of a memory of rows.
        writes: to it. Rows that will leave, at capacity, are counted as far as they fit into that.
        left: of writes to several memories, what is free on each device, without what those before will take; looked
            at once, and changed here.
    """
    left = {} if left is None else left
    needed = sum(map(grown_bytes, writes))
    directory, limit = streams.persistence.directory, streams.persistence.journal_bytes
    if directory is not None:
        free = free_disk(directory.path)
        # A chunk is in the journal first, and in a file of rows with the next checkpoint, before the journal goes.
        if 2 * needed + DISK_MARGIN > free:
            raise _full(f"the disk of {directory.path}", 2 * needed, free, DISK_MARGIN, "make room there")
        needed = min(needed, limit or needed)  # mapped files hold the rest
    device = streams.device
    available = left[device] if device in left else left.setdefault(device, free_memory(device))
    if available is not None:
        if needed + RAM_MARGIN > available:
            raise _full(f"{device} memory", needed, available, RAM_MARGIN, "keep it in a directory (Memory.open)")
        left[device] = available - needed


def grown_bytes(write: StreamWrite) -> int:
    """Return the bytes by which the rows of a stream may grow."""
    streams, store = write.streams, write.streams.stores[write.row]
    config, capacity = streams.engine.config, streams.budget.capacity
    rows = sum(-(-len(ids) * config.memory_tokens_per_chunk // config.chunk_tokens) for ids in write.chunks)
    grown = 0
    for layer in range(store.layout.layers):
        before = store.count(layer)
        # A memory that holds more than its capacity already grows no more.
        after = before + rows if capacity is None else min(before + rows, max(capacity, before))
        grown += store.bytes_for(after) - store.bytes_for(before)
    return grown


def _full(what: str, needed: int, free: int, margin: int, remedy: str) -> MemoryFullError:
    return MemoryFullError(
        f"{what} must have {needed + margin:,} bytes free for what is to be written ({needed:,}, and {margin:,} to "
        f"spare), got {free:,}; nothing was written: {remedy}, forget sources, or give the memory a bytes_budget"
    )


def free_disk(path: Path) -> int:
    """Return the bytes that are free on the disk of a directory."""
    return shutil.disk_usage(path).free


def free_memory(device: torch.device) -> int | None:
    """Return the bytes of RAM, or of a GPU's memory, that are free; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    found: list[int] = []
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]))
    with suppress(OSError, ValueError):  # ValueError: "max", there is no limit
        limit, used = (int((CGROUP / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
        found.append(limit - used)
        # Cached files count as used in a container, and the system gives them back.
        with suppress(StopIteration):
            lines = (CGROUP / "memory.stat").read_text(encoding="ascii").splitlines()
            found[-1] += int(next(line for line in lines if line.startswith("inactive_file ")).split()[1])
    return min(found, default=None)
