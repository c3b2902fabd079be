"""Pool: the memories that are open, the least recently used of which are closed where there are too many."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import TypeVar

from attrs import define, field

from mplus.errors import LiveMemoryError, MPlusError
from mplus.memory.memory import Memory
from mplus.serving.engine.metrics import Metrics
from mplus.serving.engine.refusals import LOG
from mplus.serving.messages import MemoryName

T = TypeVar("T")

REPLAYED_BYTES = 2**20
"""A memory with a journal up to this long is closed without a checkpoint: opening reads the journal in no time."""
PAUSE = 0.02
"""Seconds after which a memory that was locked is tried again, by no thread in between."""


@define(eq=False)
class Place:
    """A memory that is open, or about to be opened or closed.

    Attributes:
        memory: None until it is open.
        users: reads and changes that are under way; with none it may be closed.
        bytes: of RAM that it takes, as last looked at.
        first: the version, as clients see it, that it had when it was opened.
        settled: set when it has been opened or closed, whatever came of it.
        closing: it is being closed, so what wants it waits and opens it again.
        error: why it could not be opened, which all that waited for it are told; None: there is none.
    """

    memory: Memory | None = None
    users: int = 0
    bytes: int = 0
    first: int = 0
    settled: asyncio.Event = field(factory=asyncio.Event)
    closing: bool = False
    error: Exception | None = None


class Pool:
    """Opens memories when they are wanted, and closes idle ones; used by the engine's thread alone.

    Attributes:
        most: memories that are open at once.
        ram_bytes: that they may take together; None: no limit.
        lock_seconds: that opening waits for another process to close a memory.
    """

    def __init__(
        self,
        opened: Callable[[MemoryName], tuple[Memory, int]],
        most: int,
        ram_bytes: int | None,
        lock_seconds: float,
        executor: Executor,
        metrics: Metrics,
    ) -> None:
        """Args: ``opened`` is ``opened_memory`` of a name; called in threads of ``executor``."""
        self.most, self.ram_bytes, self.lock_seconds = most, ram_bytes, lock_seconds
        self._opened, self._executor, self._metrics = opened, executor, metrics
        self._places: OrderedDict[MemoryName, Place] = OrderedDict()
        self._room = asyncio.Condition()
        self._tasks: set[asyncio.Future[None]] = set()

    async def take(self, name: MemoryName) -> Memory:
        """Return a memory, open, which stays so until ``give``. Raises what opening raises."""
        while True:
            # Looked up anew after every wait: meanwhile it may have been closed, or opened for another request.
            place = self._places.get(name)
            if place is None:
                if await self._make_room(name):
                    await self._open(name)
            elif place.memory is None or place.closing:
                await place.settled.wait()
                if place.error is not None:  # asked for again by each of them, it would keep the last for long
                    raise place.error
            else:
                place.users += 1
                self._places.move_to_end(name)
                return place.memory

    async def _open(self, name: MemoryName) -> None:
        place = self._places[name] = Place()
        try:
            memory, version = await self._unlocked(name)
        except BaseException as error:
            del self._places[name]
            place.error = error if isinstance(error, Exception) else None
            raise
        else:
            place.memory, place.bytes, place.first = memory, memory.ram_bytes, version - memory.version
        finally:
            # In any case: whoever waits for it looks again, and opens it for itself where this has failed.
            place.settled.set()
            await self._tell()

    async def _unlocked(self, name: MemoryName) -> tuple[Memory, int]:
        """Open a memory, once no other process has it. Raises LiveMemoryError: one has it for too long."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self.lock_seconds
        while True:
            try:
                return await self._run(lambda: self._opened(name))
            except LiveMemoryError:
                if loop.time() >= end:
                    raise
            await asyncio.sleep(PAUSE)

    async def _make_room(self, name: MemoryName) -> bool:
        """Close idle memories until there is a place for one more. Returns False where ``name`` has come meanwhile."""
        while self._is_full(1):
            if not self._close_one():
                async with self._room:
                    await self._room.wait()
            if name in self._places:
                break
        return name not in self._places

    def give(self, name: MemoryName) -> None:
        """End one use of a memory that ``take`` returned."""
        place = self._places[name]
        place.users -= 1
        if not place.users and place.memory is not None:
            place.bytes = place.memory.ram_bytes
            if not place.memory.streams.persistence.is_open:  # it has failed, or is to be read only: try again
                self._begin_to_close(name, place, place.memory)
            while self._is_full(0) and self._close_one():
                pass
            self._spawn(self._tell())

    async def close(self, name: MemoryName) -> None:
        """Close a memory once nothing uses it; it may be open or not."""
        while (place := self._places.get(name)) is not None:
            if place.memory is None or place.closing:
                await place.settled.wait()
            elif place.users:
                async with self._room:
                    await self._room.wait()
            else:
                self._begin_to_close(name, place, place.memory)

    async def close_all(self) -> None:
        """Close all memories, with a checkpoint of each that has a journal."""
        await asyncio.gather(*self._tasks)
        for place in list(self._places.values()):
            if place.memory is not None and not place.closing:
                await self._run(place.memory.streams.close)
        self._places.clear()

    def version(self, name: MemoryName, version: int) -> int:
        """Return a number that grows with every change of a memory, also where it is closed and opened in between.

        Args:
            name: of a memory that is in use.
            version: ``Memory.version``, which begins anew with every opening.
        """
        return self._places[name].first + version

    @property
    def bytes(self) -> int:
        """Return what all open memories take."""
        return sum(place.bytes for place in self._places.values())

    def __len__(self) -> int:
        return len(self._places)

    def _is_full(self, more: int) -> bool:
        """Return whether ``more`` further memories are too many; one that is being closed makes room already."""
        staying = [place for place in self._places.values() if not place.closing]
        if len(staying) + more > self.most:
            return True
        taken = sum(place.bytes for place in staying)
        return self.ram_bytes is not None and len(staying) > 1 - more and taken > self.ram_bytes

    def _close_one(self) -> bool:
        """Begin to close the memory that was idle for the longest time. Returns False where none is idle."""
        for name, place in self._places.items():
            if place.memory is not None and not place.users and not place.closing:
                self._metrics.count("evictions")
                self._begin_to_close(name, place, place.memory)
                return True
        return False

    def _begin_to_close(self, name: MemoryName, place: Place, memory: Memory) -> None:
        place.closing, place.settled = True, asyncio.Event()
        self._spawn(self._close(name, place, memory))

    async def _close(self, name: MemoryName, place: Place, memory: Memory) -> None:
        try:
            await self._run(lambda: _closed(memory))
        except (MPlusError, OSError) as error:  # nothing is lost: the journal has it
            LOG.warning("a memory was closed without a checkpoint", exc_info=error)
        finally:
            del self._places[name]
            place.settled.set()
            await self._tell()

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tell(self) -> None:
        async with self._room:
            self._room.notify_all()

    async def _run(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function)


def _closed(memory: Memory) -> None:
    """Close a memory whose tail is on disk, and need not be written as a chunk."""
    directory, streams = memory.directory, memory.streams
    if directory is not None and directory.journal_bytes <= REPLAYED_BYTES:
        with streams.write_lock:
            streams.persistence.close()
    else:
        streams.close()
