"""File systems that fail, that die, and that forget what was never synced."""

from __future__ import annotations

import errno
import os
import random
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from attrs import define, field

from mplus.memory import Memory
from mplus.memory.directory import open as opening
from mplus.stores.disk.files import FileSystem
from tests.helpers.clock import noon

if TYPE_CHECKING:
    from collections.abc import Callable

    from mplus.stores.disk.files import Folder, PathAt


SECTOR = 512


def open_memory(path: Path, model: object, *, files: FileSystem | None = None, **options: Any) -> Memory:
    """Open a memory as ``Memory.open`` does, with ``files`` in the place of the real file system."""
    options.setdefault("clock", noon)  # also in other processes than that of the tests
    given = iter([] if files is None else [files])  # once: what ``files`` does may open other memories meanwhile
    with patch.object(opening, "FileSystem", lambda: next(given, None) or FileSystem()):
        return Memory.open(path, model, **options)


class Watched(FileSystem):
    """Calls ``before(call, what)`` and ``after(call, what)`` around every primitive call that changes something."""

    def __init__(self) -> None:
        self.calls = 0

    def before(self, call: int, what: str) -> None:
        """To be overridden."""

    def after(self, call: int, what: str) -> None:
        """To be overridden."""

    def _around(self, what: str, work: Callable[[], object]) -> object:
        self.calls += 1
        call = self.calls
        self.before(call, what)
        result = work()
        self.after(call, what)
        return result

    def create(self, path: PathAt) -> int:
        return self._around("create", lambda: FileSystem.create(self, path))

    def write_some(self, handle: int, data: memoryview) -> int:
        return self._around("write", lambda: FileSystem.write_some(self, handle, data))

    def truncate(self, handle: int, size: int) -> None:
        self._around("truncate", lambda: FileSystem.truncate(self, handle, size))

    def sync(self, handle: int) -> None:
        self._around("sync", lambda: None)  # nobody pulls the plug here: not waiting for the disk saves minutes

    def rename(self, source: PathAt, target: PathAt) -> None:
        self._around("rename", lambda: FileSystem.rename(self, source, target))

    def remove(self, path: PathAt) -> None:
        self._around("remove", lambda: FileSystem.remove(self, path))

    def sync_folder(self, folder: Path | Folder) -> None:
        self._around("sync_folder", lambda: None)


class Failing(Watched):
    """Raises OSError at one call, or from one call on; before its effect, or after it."""

    def __init__(self) -> None:
        super().__init__()
        self.at = 0
        self.lasting = self.late = False
        self.failed = 0

    def fail(self, at: int, *, lasting: bool, late: bool) -> None:
        """Fail at the ``at``-th call from now."""
        self.calls, self.at, self.lasting, self.late, self.failed = 0, at, lasting, late, 0

    def heal(self) -> None:
        """Work again."""
        self.at = 0

    def _strike(self, call: int, what: str) -> None:
        if self.at and (call == self.at or (self.lasting and call > self.at)):
            self.failed += 1
            code = errno.ENOSPC if what in {"create", "write"} else errno.EIO
            raise OSError(code, os.strerror(code))

    def before(self, call: int, what: str) -> None:
        if not self.late:
            self._strike(call, what)

    def after(self, call: int, what: str) -> None:
        if self.late:
            self._strike(call, what)

    def write_some(self, handle: int, data: memoryview) -> int:
        """Where it is going to fail, half of the data arrive before."""
        if self.at and self.calls + 1 == self.at and not self.late:
            os.write(handle, data[: len(data) // 2])
        return super().write_some(handle, data)


class Short(FileSystem):
    """Writes a little at a time."""

    def write_some(self, handle: int, data: memoryview) -> int:
        return os.write(handle, data[: max(1, len(data) // 3)])


class Deadly(Watched):
    """Kills its process at one call: before it, or in the middle of it where it is a write."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def before(self, call: int, what: str) -> None:
        if call == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def write_some(self, handle: int, data: memoryview) -> int:
        if self.calls + 1 == self.at:
            os.write(handle, data[: len(data) // 2])
        return super().write_some(handle, data)


@define(eq=False)
class Node:
    """A file: what programs see of it, and what is on disk for certain."""

    seen: bytearray = field(factory=bytearray)
    kept: bytes = b""


class Forgetful(Watched):
    """Works, and knows what a loss of power would leave: synced content, under names that a synced folder has."""

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[Path, Node] = {}
        self.kept_names: dict[Path, Node] = {}
        self.open: dict[int, Node] = {}

    def create(self, path: PathAt) -> int:
        handle = super().create(path)
        self.names[Path(path)] = self.open[handle] = Node()
        return handle

    def extend(self, path: PathAt) -> int:
        handle = super().extend(path)
        self.open[handle] = self.names[Path(path)]
        return handle

    def write_some(self, handle: int, data: memoryview) -> int:
        written = super().write_some(handle, data)
        self.open[handle].seen += data[:written]
        return written

    def truncate(self, handle: int, size: int) -> None:
        super().truncate(handle, size)
        del self.open[handle].seen[size:]

    def sync(self, handle: int) -> None:
        super().sync(handle)
        self.open[handle].kept = bytes(self.open[handle].seen)

    def rename(self, source: PathAt, target: PathAt) -> None:
        super().rename(source, target)
        self.names[Path(target)] = self.names.pop(Path(source))

    def remove(self, path: PathAt) -> None:
        super().remove(path)
        del self.names[Path(path)]

    def sync_folder(self, folder: Path | Folder) -> None:
        super().sync_folder(folder)
        folder = Path(str(folder))
        self.kept_names = {path: node for path, node in self.kept_names.items() if path.parent != folder}
        self.kept_names |= {path: node for path, node in self.names.items() if path.parent == folder}

    def lose_power(self, folder: Path, into: Path, draw: random.Random | None) -> None:
        """Write to ``into`` what of ``folder`` a loss of power leaves.

        ``draw`` None: nothing that was not synced. Otherwise any part of it: each name as it was or as it is, and of
        what was written since the last sync any sectors, zeros in place of the others.
        """
        into.mkdir()
        for path in self.names.keys() | self.kept_names.keys():
            if path.parent != folder:
                continue
            node = self.kept_names.get(path)
            if draw is not None and draw.random() < 0.5:
                node = self.names.get(path)
            if node is not None:
                (into / path.name).write_bytes(node.kept if draw is None else _torn(node, draw))


def _torn(node: Node, draw: random.Random) -> bytes:
    seen, kept = bytes(node.seen), node.kept
    if len(seen) < len(kept):  # cut, not synced
        return draw.choice((seen, kept))
    size = draw.choice((len(kept), len(seen), draw.randint(len(kept), len(seen))))
    content = bytearray(seen[:size])
    for at in range(len(kept) // SECTOR * SECTOR, size, SECTOR):
        if draw.random() < 0.3:
            begin = max(at, len(kept))
            content[begin : at + SECTOR] = bytes(len(content[begin : at + SECTOR]))
    return bytes(content)
