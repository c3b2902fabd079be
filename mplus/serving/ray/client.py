"""RayEngineClient: the engines of a cluster, as a front sees one."""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from attrs import evolve
from ray.exceptions import RayActorError

from mplus.config import JsonValue
from mplus.serving.errors import ServingError
from mplus.serving.messages import (
    Command,
    DescribeMemory,
    DescribeUsage,
    EndRow,
    Event,
    Generate,
    ListMemories,
    ListSources,
    MemoryName,
    ModelFacts,
    ReadSource,
    ReleaseMemory,
    SearchMemory,
    WriteMemory,
)
from mplus.serving.ray.placement import placement_key

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

T = TypeVar("T")
REPEATABLE = (DescribeMemory, DescribeUsage, ListMemories, ListSources, ReadSource, SearchMemory, WriteMemory)
"""Commands that may be sent again where it is not known whether the first time did anything; writes by their id."""
LONGEST_WAIT = 30.0
"""Seconds that another engine has for ending what it reads of a memory that is asked back."""
TRIES, PAUSE = 40, 0.1
"""How often a request is sent whose engine ended, and the seconds between: a router notices within the first few."""


class RayEngineClient:
    """Sends each request to the engine that owns its memory; an ``EngineClient``.

    Where an engine ends, what had not begun is sent to the next owner, and writes are written once: each has an id.
    A memory that another engine still has open is asked back, which it gives as soon as nothing reads it.

    Attributes:
        handle: of the deployment of engines, whose router is an ``OwnerRouter``.
    """

    def __init__(self, handle: DeploymentHandle[Any], end: Callable[[], None]) -> None:
        """Args: ``end`` is called by ``close``, in a thread."""
        self.handle, self._end = handle, end

    async def model(self) -> ModelFacts:
        """Return the facts of the decoder, which all engines share."""
        return await self._patiently(lambda: self._ask("model", ""))

    async def call(self, command: Command) -> Mapping[str, JsonValue]:
        """Return the answer of the engine that owns the command's memory. Raises ServingError."""
        if isinstance(command, EndRow):  # the engine that has this answer ends its row
            await self.handle.broadcast("call", command).results_async(return_exceptions=True)
            return {}
        if isinstance(command, WriteMemory) and command.write_id is None:
            command = evolve(command, write_id=uuid.uuid4().hex)
        key = placement_key(command)
        tries = TRIES if isinstance(command, REPEATABLE) else 1
        try:
            return await self._patiently(lambda: self._ask("call", key, command), tries)
        except ServingError as error:
            if error.facts.code != "memory_busy":
                raise
        await self._ask_back(command.memory)  # type: ignore[union-attr]  # only a memory can be busy
        return await self._patiently(lambda: self._ask("call", key, command), tries)

    async def generate(self, request: Generate) -> AsyncIterator[Sequence[Event]]:
        """Yield what happens to a request; ``aclose`` cancels it at its engine."""
        for attempt in range(TRIES):
            begun = False
            try:
                async for events in self._stream(request):
                    begun = True
                    yield events
                return
            except RayActorError as error:
                if begun or attempt == TRIES - 1:
                    raise _engine_ended() from error
                await asyncio.sleep(PAUSE)
            except ServingError as error:
                if begun or attempt or error.facts.code != "memory_busy" or request.memory is None:
                    raise
                await self._ask_back(request.memory)

    async def metrics(self) -> Mapping[str, float]:
        """Return the sums of all engines' numbers, and how many engines have answered."""
        told = await self.handle.broadcast("metrics").results_async(return_exceptions=True)
        answered = [numbers for numbers in told if not isinstance(numbers, BaseException)]  # others end just now
        total: Counter[str] = Counter()
        for numbers in answered:
            total.update(numbers)
        return {**total, "engines": len(answered)}

    async def close(self) -> None:
        """End the engines, if this process started them; each closes its memories."""
        await asyncio.to_thread(self._end)

    async def _stream(self, request: Generate) -> AsyncIterator[Sequence[Event]]:
        handle = self.handle.options(method_name="generate", multiplexed_model_id=placement_key(request), stream=True)
        response = handle.remote(request)
        ended = False
        try:
            async for events in response:
                if isinstance(events, ServingError):
                    ended = True
                    raise events
                yield events
            ended = True
        finally:
            if not ended:
                response.cancel()

    async def _ask(self, method: str, key: str, *arguments: Command) -> Any:  # Ray's, not typed
        reply = await self.handle.options(method_name=method, multiplexed_model_id=key).remote(*arguments)
        if isinstance(reply, ServingError):
            raise reply
        return reply

    async def _ask_back(self, memory: MemoryName) -> None:
        """Let all engines close a memory; the one that has it open does so once nothing reads it."""
        asked = self.handle.broadcast("call", ReleaseMemory(memory))
        with suppress(TimeoutError):  # it is still being read there, and the next answer says so
            await asked.results_async(timeout_s=LONGEST_WAIT, return_exceptions=True)

    async def _patiently(self, ask: Callable[[], Awaitable[T]], tries: int = TRIES) -> T:
        """Return what ``ask`` returns, asking again where the engine it went to has ended meanwhile."""
        for attempt in range(tries):
            try:
                return await ask()
            except RayActorError as error:
                if attempt == tries - 1:
                    raise _engine_ended() from error
                await asyncio.sleep(PAUSE)
        raise AssertionError("not reached")


def _engine_ended() -> ServingError:
    return ServingError(
        "the engine that answered this request has ended: try again", 503, "server_error", code="engine_ended",
        retry_after=1,
    )  # fmt: skip
