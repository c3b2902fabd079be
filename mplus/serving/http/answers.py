"""Answers: the engine's events for a request, through a bounded queue, until all is said or nobody listens."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing, suppress
from typing import TypeVar, cast

from attrs import define, field
from starlette.requests import ClientDisconnect, Request

from mplus.serving.errors import ServingError
from mplus.serving.http.front import Front
from mplus.serving.http.record import RequestRecord
from mplus.serving.messages import Began, EndRow, Event, Generate, NewToken

T = TypeVar("T")
Step = list[tuple[int, Event]]
"""Events, each with the place of its prompt in the request."""


@define(eq=False)
class Answers:
    """The events of the prompts of one request while they are answered.

    The engine is heard in tasks of their own, whatever the client does: one that does not read fills a queue of
    ``front.stream_room`` steps, and then is cut off.

    Attributes:
        front: of the server.
        requests: one for each prompt.
        record: of the HTTP request.
        cut_off: ends the sending, when the client turns out not to read; returns whether there was something to end.
    """

    front: Front
    requests: Sequence[Generate]
    record: RequestRecord
    cut_off: Callable[[], bool] = lambda: False
    _items: deque[Step | Exception] = field(factory=deque, init=False)
    _wake: asyncio.Event = field(factory=asyncio.Event, init=False)
    _tasks: list[asyncio.Task[None]] = field(factory=list, init=False)
    _left: int = field(default=0, init=False)
    _last: float | None = field(default=None, init=False)

    def start(self) -> None:
        """Ask the engine."""
        self._left = len(self.requests)
        self.front.answers.add(self)
        self._tasks = [asyncio.create_task(self._hear(place, one)) for place, one in enumerate(self.requests)]

    def cancel(self) -> None:
        """Ask the engine to stop, without waiting; for use at the end as well."""
        self.front.answers.discard(self)
        for task in self._tasks:
            task.cancel()

    def fail(self, error: Exception) -> None:
        """End the answers with an error, behind what the client has not had yet."""
        self.cancel()
        self._put(error)

    def end_row(self, place: int, row: int) -> None:
        """Ask the engine to end one row of a prompt's answers, whose text is complete."""
        self._tasks.append(asyncio.create_task(self._end_row(EndRow(self.requests[place].id, row))))

    async def _end_row(self, command: EndRow) -> None:
        with suppress(ServingError):  # the engine has ended, which the answer says as well
            await self.front.call(command)

    async def steps(self, seconds: float | None = None) -> AsyncIterator[Step]:
        """Yield what has come, all at once; an empty list where nothing came for ``seconds``.

        Raises what the engine raises, behind the events before it.
        """
        while True:
            while not self._items:
                if not self._left:
                    return
                self._wake.clear()
                try:
                    async with asyncio.timeout(seconds):
                        await self._wake.wait()
                except TimeoutError:
                    yield []
            items = [self._items.popleft() for _ in range(len(self._items))]
            if step := [event for item in items if not isinstance(item, Exception) for event in item]:
                yield step
            for item in items:
                if isinstance(item, Exception):
                    raise item

    async def _hear(self, place: int, request: Generate) -> None:
        """Hear one prompt's events to their end, and count them."""
        metrics, began = self.front.metrics, False
        metrics.waiting.inc()
        try:
            async with aclosing(cast(AsyncGenerator[Sequence[Event]], self.front.client.generate(request))) as events:
                async for step in events:
                    if not began and isinstance(step[0], Began):
                        began = True
                        metrics.waiting.dec()
                        metrics.running.inc()
                    self._count(step)
                    self._put([(place, event) for event in step])
        except Exception as error:  # noqa: BLE001 - raised where the events are read
            self._put(error)
        finally:
            (metrics.running if began else metrics.waiting).dec()
            self._left -= 1
            self._wake.set()

    def _put(self, item: Step | Exception) -> None:
        if len(self._items) >= self.front.stream_room:
            self.record.reason = "slow reader"
            self.cancel()
            self.cut_off()
            return
        self._items.append(item)
        self._wake.set()

    def _count(self, step: Sequence[Event]) -> None:
        now = time.perf_counter()
        if any(isinstance(event, Began) for event in step) and self.record.read is None:
            self.record.read = now - self.record.began
        tokens = sum(isinstance(event, NewToken) for event in step)
        if not tokens:
            return
        self.front.metrics.tokens.inc(tokens)
        if self.record.first is None:
            self.record.first = now - self.record.began
            self.front.metrics.first_token.observe(self.record.first)
        elif self._last is not None:
            self.front.metrics.gap.observe(now - self._last)
        self._last = now


async def unless_gone(request: Request, work: Coroutine[None, None, T]) -> T:
    """Return what ``work`` does, or cancel it when the client leaves; the body must have been read.

    Raises ClientDisconnect: it left.
    """
    task, left = asyncio.create_task(work), asyncio.create_task(until_left(request))
    try:
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            left.result()
        return task.result()
    finally:
        left.cancel()
        task.cancel()
        await asyncio.wait({task})  # it has noted by then what came of it


async def until_left(request: Request) -> None:
    """Raise ClientDisconnect when the client leaves; the body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    raise ClientDisconnect
