"""EngineClient in the process of the engine: requests go to its thread, and what it says comes back to asyncio."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Mapping, Sequence

from mplus.config import JsonValue
from mplus.serving.config import ServeConfig
from mplus.serving.engine.decoder import ServedDecoder
from mplus.serving.engine.engine import Delivery, Engine
from mplus.serving.errors import ServingError
from mplus.serving.messages import Command, EngineClient, Event, Generate, ModelFacts

SLOWEST = 4096
"""Deliveries that a reader of a stream may be behind, before its answer is ended."""


class Inbox:
    """Deliveries of each request, until it is fetched; used by one thread with an event loop."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._queues: dict[int, asyncio.Queue[Delivery]] = {}

    def begin(self) -> int:
        """Return the number of a new request."""
        number = next(self._numbers)
        self._queues[number] = asyncio.Queue()
        return number

    def end(self, number: int) -> None:
        """Forget a request, whatever is delivered of it."""
        self._queues.pop(number, None)

    async def next(self, number: int) -> Delivery:
        """Return what is delivered next of a request. Raises ServingError where that says so."""
        delivery = await self._queues[number].get()
        if delivery.error is not None:
            raise delivery.error
        return delivery

    def deliver(self, deliveries: Sequence[Delivery]) -> None:
        """Take what an engine says."""
        for delivery in deliveries:
            queue = self._queues.get(delivery.number)
            if queue is None:
                continue
            late = ServingError("the answer was not read for too long, and was ended", 408, "server_error")
            is_late = queue.qsize() > SLOWEST
            queue.put_nowait(Delivery(delivery.number, error=late, over=True) if is_late else delivery)

    def fail(self, error: ServingError) -> None:
        """End all requests with an error."""
        self.deliver([Delivery(number, error=error, over=True) for number in list(self._queues)])


class InProcessEngine(EngineClient):
    """An engine in a thread of this process.

    Example:
        >>> async with asyncio.timeout(60):  # doctest: +SKIP
        ...     client = InProcessEngine(decoder, config)
        ...     await client.call(messages.MakeMemory(MemoryName("ada", "notes")))
    """

    def __init__(self, decoder: ServedDecoder, config: ServeConfig) -> None:
        """Start an engine. The client belongs to the event loop that uses it first."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._inbox = Inbox()
        self.engine = Engine(decoder, config, self._hand_over)

    async def model(self) -> ModelFacts:
        """Return the facts of the decoder."""
        return self.engine.decoder.facts

    async def call(self, command: Command) -> Mapping[str, JsonValue]:
        """Return the answer to a command. Raises ServingError."""
        number = self._begin()
        try:
            self.engine.submit(number, command)
            return (await self._inbox.next(number)).answer
        finally:
            self._inbox.end(number)

    async def generate(self, request: Generate) -> AsyncIterator[Sequence[Event]]:
        """Yield what happens to a request; see ``EngineClient.generate``."""
        number, over = self._begin(), False
        try:
            self.engine.submit(number, request)
            while not over:
                try:
                    delivery = await self._inbox.next(number)
                except ServingError:
                    over = True
                    raise
                over = delivery.over
                if delivery.events:
                    yield delivery.events
        finally:
            self._inbox.end(number)
            if not over:
                self.engine.cancel(number)

    async def metrics(self) -> Mapping[str, float]:
        """Return counts and sums, by name."""
        return self.engine.numbers()

    async def close(self) -> None:
        """End what runs and close all memories."""
        await asyncio.to_thread(self.engine.close)

    def _begin(self) -> int:
        self._loop = asyncio.get_running_loop()
        return self._inbox.begin()

    def _hand_over(self, deliveries: Sequence[Delivery]) -> None:
        if self._loop is not None:  # else nothing was asked yet
            self._loop.call_soon_threadsafe(self._inbox.deliver, deliveries)
