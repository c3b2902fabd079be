"""Writer: writes the texts of all memories, a chunk of each in turn, in a thread beside that of the answers."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from mplus.serving.engine.answers.pace import Pace
from mplus.serving.engine.memories.writing import MemoryWrite, write_next
from mplus.serving.engine.metrics import Metrics

T = TypeVar("T")

SLICE = 0.02
"""Seconds after which a pause looks whether answers are still generated."""
Waiting = tuple[MemoryWrite, asyncio.Future[None]]


class Writer:
    """Texts that are being written; used by the engine's thread alone, which starts ``work``.

    Reads see a memory as it was when they began, so a write in another thread disturbs none of them; and where an
    operation of the decoder takes long, it runs beside those of the answers.

    Args:
        pace, metrics: of the engine.
        answering: returns whether answers are generated now.
    """

    def __init__(self, pace: Pace, metrics: Metrics, answering: Callable[[], bool]) -> None:
        self._pace, self._metrics, self._answering = pace, metrics, answering
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mplus-writer")
        self._waiting: deque[Waiting] = deque()
        self._some = asyncio.Event()

    async def write(self, write: MemoryWrite) -> None:
        """Wait until all of a text is written; different texts are of different memories. Raises what a chunk does."""
        if write.chunks:
            done = asyncio.get_running_loop().create_future()
            self._waiting.append((write, done))
            self._some.set()
            await done

    async def run(self, function: Callable[[], T]) -> T:
        """Call what changes a memory with the decoder, between two chunks of others."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def work(self) -> None:
        """Write what there is to write, as long as the engine lives."""
        while True:
            await self._some.wait()
            count = min(self._pace.chunks(answering=self._answering()), len(self._waiting))
            some = [self._waiting.popleft() for _ in range(count)]
            begun = time.perf_counter()
            errors = await self.run(lambda writes=[write for write, _ in some]: _written(writes))  # type: ignore[misc]
            seconds = time.perf_counter() - begun
            self._pace.wrote(count, seconds)
            self._metrics.count("write_chunks", count - len(errors))
            self._metrics.took("commit_seconds", seconds)
            self._settle(some, errors)
            if not self._waiting:
                self._some.clear()
            await self._rest(self._pace.pause(seconds))

    def _settle(self, some: Sequence[Waiting], errors: Mapping[int, Exception]) -> None:
        for place, (write, done) in enumerate(some):
            if place in errors:
                if not done.done():
                    done.set_exception(errors[place])
            elif write.chunks and not done.cancelled():
                self._waiting.append((write, done))
            elif not done.done():
                done.set_result(None)

    async def _rest(self, seconds: float) -> None:
        until = time.perf_counter() + seconds
        while self._answering() and (left := until - time.perf_counter()) > 0:
            await asyncio.sleep(min(left, SLICE))

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=True)


def _written(writes: Sequence[MemoryWrite]) -> Mapping[int, Exception]:
    try:
        return write_next(writes)
    except Exception as error:  # noqa: BLE001 - becomes the answer to all of them
        return dict.fromkeys(range(len(writes)), error)
