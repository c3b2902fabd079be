"""EngineClient in the process of the engine: requests go to its thread, and what it says comes back to asyncio."""

from __future__ import annotations

import asyncio
import itertools
from abc import abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING

from mplus.config import JsonValue
from mplus.serving.config import ServeConfig
from mplus.serving.errors import ServingError
from mplus.serving.messages import Command, Delivery, EngineClient, Event, Generate, ModelFacts

if TYPE_CHECKING:
    from mplus.serving.engine.decoder import ServedDecoder

SLOWEST = 4096
"""Deliveries that a reader of a stream may be behind, before its answer is ended."""


class Inbox:
    """Deliveries of each request, until they are fetched; used by one thread with an event loop."""

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


class NumberedClient(EngineClient):
    """A client whose requests have numbers, by which an engine somewhere says what comes of them.

    Attributes:
        inbox: of what it said.
    """

    def __init__(self) -> None:
        self.inbox = Inbox()

    @abstractmethod
    def submit(self, number: int, request: Command | Generate) -> None:
        """Hand a request to the engine. Raises ServingError (503) while there is none."""

    @abstractmethod
    def cancel(self, number: int) -> None:
        """Let the engine end a request that is not over."""

    async def call(self, command: Command) -> Mapping[str, JsonValue]:
        """Return the answer to a command. Raises ServingError."""
        number = self.inbox.begin()
        try:
            self.submit(number, command)
            return (await self.inbox.next(number)).answer
        finally:
            self.inbox.end(number)

    async def generate(self, request: Generate) -> AsyncIterator[Sequence[Event]]:
        """Yield what happens to a request; see ``EngineClient.generate``."""
        number, over = self.inbox.begin(), True
        try:
            self.submit(number, request)
            over = False
            while not over:
                delivery = await self.inbox.next(number)
                over = delivery.over
                if delivery.events:
                    yield delivery.events
        finally:
            self.inbox.end(number)
            if not over:  # it has failed, is not wanted any more, or was not read
                self.cancel(number)


class InProcessEngine(NumberedClient):
    """An engine in a thread of this process; its client belongs to one event loop.

    Attributes:
        engine: the engine.

    Example:
        >>> client = InProcessEngine(decoder, config)  # doctest: +SKIP
        >>> await client.call(messages.MakeMemory(MemoryName("ada", "notes")))  # doctest: +SKIP
    """

    def __init__(self, decoder: ServedDecoder, config: ServeConfig) -> None:
        """Start the engine."""
        # Only here: a front starts its engine in another process before it has loaded torch itself.
        from mplus.serving.engine.engine import Engine

        super().__init__()
        self._loop: asyncio.AbstractEventLoop | None = None
        self.engine = Engine(decoder, config, self._hand_over)

    def submit(self, number: int, request: Command | Generate) -> None:
        """Hand a request to the engine."""
        self._loop = asyncio.get_running_loop()
        self.engine.submit(number, request)

    def cancel(self, number: int) -> None:
        """Let the engine end a request that is not over."""
        self.engine.cancel(number)

    async def model(self) -> ModelFacts:
        """Return the facts of the decoder."""
        return self.engine.decoder.facts

    async def metrics(self) -> Mapping[str, float]:
        """Return counts and sums, by name."""
        return self.engine.numbers()

    async def close(self) -> None:
        """End what runs and close all memories."""
        await asyncio.to_thread(self.engine.close)

    def _hand_over(self, deliveries: Sequence[Delivery]) -> None:
        if self._loop is not None and not self._loop.is_closed():  # else nobody waits for it
            self._loop.call_soon_threadsafe(self.inbox.deliver, deliveries)
