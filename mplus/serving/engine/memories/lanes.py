"""Lanes: the one order of what is done to a memory, so that a read sees the writes that were accepted before it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from attrs import define, field

from mplus.serving.messages import MemoryName


@define(eq=False)
class Lane:
    """The changes of one memory: one after the other, in the order in which they were accepted.

    Attributes:
        accepted: how many there were.
        finished: how many of them are over, well or not.
        waiting: what is woken when so many are.
    """

    accepted: int = 0
    finished: int = 0
    waiting: list[tuple[int, asyncio.Future[None]]] = field(factory=list)

    async def until(self, finished: int) -> None:
        """Wait until so many changes are over."""
        if self.finished < finished:
            future = asyncio.get_running_loop().create_future()
            self.waiting.append((finished, future))
            await future

    def finish(self) -> None:
        """Note that one more change is over, and wake what waits for it."""
        self.finished += 1
        due = [future for number, future in self.waiting if number <= self.finished and not future.done()]
        self.waiting = [(number, future) for number, future in self.waiting if number > self.finished]
        for future in due:
            future.set_result(None)


class Lanes:
    """The lanes of all memories that something is being done to; used by the engine's thread alone."""

    def __init__(self) -> None:
        self._lanes: dict[MemoryName, Lane] = {}

    def begin_read(self, name: MemoryName) -> tuple[Lane, int] | None:
        """Return what a read that arrives now waits for (``Lane.until``); None: nothing."""
        lane = self._lanes.get(name)
        return None if lane is None else (lane, lane.accepted)

    @asynccontextmanager
    async def change(self, name: MemoryName) -> AsyncIterator[None]:
        """Hold the memory for a change, once all that were accepted before are over. Entered on arrival."""
        lane = self._lanes.setdefault(name, Lane())
        before, lane.accepted = lane.accepted, lane.accepted + 1
        turn = asyncio.ensure_future(lane.until(before))
        try:
            await asyncio.shield(turn)
            yield
        finally:
            if not turn.done():  # cancelled in the queue: its turn passes once it comes
                turn.add_done_callback(lambda _: self._finish(name, lane))
            else:
                self._finish(name, lane)

    def _finish(self, name: MemoryName, lane: Lane) -> None:
        lane.finish()
        if lane.finished == lane.accepted and self._lanes.get(name) is lane:
            del self._lanes[name]
