"""Front: the state of a server between requests, and what routes ask of it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Annotated, Protocol, cast

from attrs import define, field
from fastapi import Depends
from starlette.requests import Request

from mplus.config import JsonValue
from mplus.serving.config import ServeConfig
from mplus.serving.errors import ServingError
from mplus.serving.http.bodies import is_id
from mplus.serving.http.errors import bad_request
from mplus.serving.http.keys import Caller, Keys, Right
from mplus.serving.http.metrics import Metrics
from mplus.serving.http.record import RequestRecord
from mplus.serving.http.tokenizer import Tokenizer
from mplus.serving.messages import Command, EngineClient, MemoryName, ModelFacts


class Cancellable(Protocol):
    """An answer that is being given."""

    def fail(self, error: Exception) -> None:
        """End it with an error."""


@define(frozen=True)
class Decoder:
    """The decoder as routes need it: its facts and its tokenizer."""

    facts: ModelFacts
    tokenizer: Tokenizer

    def room(self, prompt: Sequence[int], asked: int | None) -> int:
        """Return how many tokens an answer may have: what was asked for, or what there is room for."""
        left = self.facts.context - len(prompt)
        return left if asked is None else min(asked, left)


@define(eq=False)
class Front:
    """The state of a server.

    Attributes:
        client: of the engine.
        config: limits and folders.
        keys: who may do what.
        metrics_open: whether ``/metrics`` needs no key.
        comment_seconds: between comment frames of a stream in which nothing happens.
        stream_room: steps that a stream may be behind its engine before its client counts as one that does not read.
        metrics: counts.
        draining: the server ends, and takes no new requests.
        answers: being given now.
        requests: being answered now, all but those for the server's own state.
        of_keys: requests being answered now, by the id of the key they came with.
        incoming: bytes of memories that are being sent to be taken in, by tenant.
    """

    client: EngineClient
    config: ServeConfig
    keys: Keys
    metrics_open: bool = False
    comment_seconds: float = 15.0
    stream_room: int = 2048
    metrics: Metrics = field(factory=Metrics)
    draining: bool = False
    answers: set[Cancellable] = field(factory=set)
    requests: int = 0
    of_keys: Counter[str] = field(factory=Counter)
    incoming: Counter[str] = field(factory=Counter)
    _decoder: Decoder | None = None
    _loading: asyncio.Lock = field(factory=asyncio.Lock)

    async def decoder(self) -> Decoder:
        """Return the decoder. Raises ServingError (503): it is not there yet."""
        if self._decoder is None:
            async with self._loading:
                if self._decoder is None:
                    facts = await self.client.model()
                    made = await asyncio.to_thread(Tokenizer, facts.folder, facts.context, facts.vocabulary)
                    self._decoder = Decoder(facts, made)
        return self._decoder

    async def served(self, name: str | None) -> Decoder:
        """Return the decoder that a request names; None: it names none. Raises ServingError (404): there is no such."""
        decoder = await self.decoder()
        if name is not None and name != decoder.facts.name:
            message = f"there is no model {name[:100]!r}: this server has {decoder.facts.name!r}"
            raise ServingError(message, 404, "not_found_error", param="model", code="model_not_found")
        return decoder

    async def call(self, command: Command) -> Mapping[str, JsonValue]:
        """Return the engine's answer to a command. Raises ServingError."""
        return await self.client.call(command)

    @contextmanager
    def counted(self, caller: Caller) -> Iterator[None]:
        """Count a request while it is answered. Raises ServingError (429): its key has as many as it may have."""
        key = caller.key or ""
        if caller.requests is not None and self.of_keys[key] >= caller.requests:
            message = f"this key may have {caller.requests} requests at once: wait until one is answered"
            raise ServingError(message, 429, "rate_limit_error", code="too_many_requests", retry_after=1)
        self.of_keys[key] += 1
        try:
            yield
        finally:
            self.of_keys[key] -= 1

    async def drain(self, seconds: float) -> None:
        """Take no new requests, and wait for those that have begun; after ``seconds``, end answers with an error."""
        self.draining = True
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.requests:
                    await asyncio.sleep(0.05)
        for answer in list(self.answers):
            answer.fail(shutting_down())


def shutting_down() -> ServingError:
    """Return the error (503) of a request that comes, or is not over, when the server ends."""
    return ServingError("the server is shutting down", 503, "server_error", code="shutting_down", retry_after=5)


def front_of(request: Request) -> Front:
    """Return the state of the server that a request came to."""
    return cast(Front, request.app.state.front)


def record_of(request: Request) -> RequestRecord:
    """Return the record of a request."""
    return cast(RequestRecord, request.scope["state"]["record"])


def caller_of(request: Request) -> Caller:
    """Return whom a request comes from."""
    return cast(Caller, request.scope["state"]["caller"])


def need(caller: Caller, right: Right) -> Caller:
    """Return a caller that has a right. Raises ServingError (403): it has not."""
    if right not in caller.rights:
        message = f"the key does not give the right to {right}"
        raise ServingError(message, 403, "permission_error", code="permission_denied")
    return caller


def caller_with(right: Right) -> Callable[[Request], Caller]:
    """Return a dependency of routes: whom a request comes from, refused (403) without this right."""

    def caller(request: Request) -> Caller:
        return need(caller_of(request), right)

    return caller


FrontOf = Annotated[Front, Depends(front_of)]
Reader = Annotated[Caller, Depends(caller_with("read"))]
Writer = Annotated[Caller, Depends(caller_with("write"))]


def memory_name(caller: Caller, memory_id: str, param: str = "id") -> MemoryName:
    """Return a caller's memory by its id. Raises ServingError (400): no id can be like this."""
    if not is_id(memory_id):
        message = f"{param} must be 1 to 128 letters, digits or ._:@- and begin with a letter or digit"
        raise bad_request(message, param, "invalid_id")
    return MemoryName(caller.tenant, memory_id)
