"""EngineReplica: an engine as a replica of a Ray Serve deployment."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Mapping, Sequence

from attrs import define, field
from filelock import FileLock

from mplus.config import JsonValue
from mplus.serving.config import ServeConfig
from mplus.serving.engine.client import InProcessEngine
from mplus.serving.engine.source import DecoderSource
from mplus.serving.errors import ServingError
from mplus.serving.messages import Command, Event, Generate, ModelFacts
from mplus.serving.ray.agreement import agree


@define(frozen=True, kw_only=True)
class EngineSettings:
    """Settings of the engines of a server.

    Attributes:
        source: of the decoder, which every machine loads for itself.
        config: of the server; the folder of memories is one that all engines share.
        server: an id of this start of the server.
    """

    source: DecoderSource
    config: ServeConfig
    server: str = field(factory=lambda: uuid.uuid4().hex)


class EngineReplica:
    """An engine in a process of Ray's. Errors are returned, not raised, as Ray wraps those it carries in its own.

    Args:
        settings: of all engines of the server.

    Raises:
        MemoryMismatchError: the decoder is not that of the other engines.
        CheckpointError: it cannot be loaded.
    """

    def __init__(self, settings: EngineSettings) -> None:
        folder = settings.config.memories
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with FileLock(folder / ".loading.lock"):  # the first engine keeps what was added to the decoder, for all
            decoder = settings.source.load(settings.config)
        agree(folder, settings.server, decoder.model.mplus_engine.fingerprint())
        self._client = InProcessEngine(decoder, settings.config)

    async def model(self) -> ModelFacts:
        """Return the facts of the decoder."""
        return await self._client.model()

    async def call(self, command: Command) -> Mapping[str, JsonValue] | ServingError:
        """Return the answer to a command, or why there is none."""
        try:
            return await self._client.call(command)
        except ServingError as error:
            return error

    async def generate(self, request: Generate) -> AsyncIterator[Sequence[Event] | ServingError]:
        """Yield what happens to a request, and at the end an error if it failed. Cancelled, it leaves the batch."""
        try:
            async for events in self._client.generate(request):
                yield events
        except ServingError as error:
            yield error

    async def metrics(self) -> Mapping[str, float]:
        """Return the engine's numbers."""
        return await self._client.metrics()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return what ``wanted_engines`` looks at; called by Ray."""
        numbers = await self._client.metrics()
        return {name: numbers[name] for name in ("requests_waiting", "requests_running")}

    async def check_health(self) -> None:
        """Raise ServingError where the engine has ended; called by Ray, which then starts another one."""
        if not self._client.engine.is_alive:
            raise ServingError("the engine's thread has ended", 503, "server_error")

    async def __del__(self) -> None:
        """Close all memories; called by Ray when the replica has nothing left to answer."""
        await self._client.close()
