"""Running a request to its answer: whole, or as a stream of server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import Protocol, TypeAlias

from attrs import define
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from mplus.config import JsonValue
from mplus.serving.errors import ServingError
from mplus.serving.http.answers import Answers, Step, unless_gone, until_left
from mplus.serving.http.errors import internal_error
from mplus.serving.http.openai.rows import Delta, Reply
from mplus.serving.http.record import logger
from mplus.serving.messages import Began, Event, NewToken

HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
"""So that no proxy holds a stream back."""
COMMENT = ": waiting\n\n"
REFUSED_WITHIN = 0.5
"""Seconds that the headers of a stream wait for the engine, so that a refusal has a status of its own."""
JsonObject: TypeAlias = Mapping[str, JsonValue]
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class Shape(Protocol):
    """The form in which a route answers."""

    def opening(self, reply: Reply, place: int) -> Iterable[str]:
        """Return the frames that begin the answers to a prompt which has been read."""

    def piece(self, reply: Reply, delta: Delta) -> Iterable[str]:
        """Return the frames of a piece of text."""

    def closing(self, reply: Reply, memory_error: JsonObject | None) -> Iterable[str]:
        """Return the frames at the end."""

    def whole(self, reply: Reply, memory_error: JsonObject | None) -> JsonObject:
        """Return the answer that is not streamed."""


Remember = Callable[[Reply], Awaitable[JsonObject | None]]
"""Writes what was said; returns the error object where that failed."""


async def nothing(_: Reply) -> None:
    """Write nothing."""


@define(eq=False)
class Run:
    """A request that is being answered.

    Attributes:
        answers: the events of the engine.
        reply: what they make.
        shape: of what is sent.
        remember: is called when all is said, before the client is told so.
    """

    answers: Answers
    reply: Reply
    shape: Shape
    remember: Remember = nothing

    async def respond(self, request: Request, stream: bool) -> Response:
        """Return the HTTP answer. Raises ServingError: the engine refused the request; ClientDisconnect."""
        self.answers.start()
        if not stream:
            return JSONResponse(await unless_gone(request, self._whole()))
        steps = aiter(self.answers.steps(self.answers.front.comment_seconds))
        # A task, as a timeout would end the iterator.
        first, left = asyncio.ensure_future(anext(steps, None)), asyncio.create_task(until_left(request))
        try:
            await asyncio.wait({first, left}, timeout=REFUSED_WITHIN, return_when=asyncio.FIRST_COMPLETED)
            for one in (left, first):
                if one.done():
                    one.result()
        except BaseException:
            self.finish()
            raise
        finally:
            left.cancel()
        return EventStream(self, self._frames(first, steps))

    async def _whole(self) -> JsonObject:
        try:
            async for step in self.answers.steps():
                for place, event in step:
                    self._take(place, event)
                if self.reply.over:
                    break
            return self.shape.whole(self.reply, await self.remember(self.reply))
        finally:
            self.finish()

    async def _frames(self, first: asyncio.Future[Step | None], steps: AsyncIterator[Step]) -> AsyncIterator[str]:
        try:
            step = await first
            while step is not None:
                if text := "".join(self._frames_of(step)):
                    yield text
                step = None if self.reply.over else await anext(steps, None)
            self.answers.cancel()
            yield "".join(self.shape.closing(self.reply, await self.remember(self.reply))) + "data: [DONE]\n\n"
        except ServingError as error:
            self.answers.record.reason = "error"
            yield frame(error.body())
        except Exception:  # noqa: BLE001 - told in the stream, as its status is sent
            logger.exception("request id=%s failed in its stream", self.answers.record.id)
            self.answers.record.reason = "error"
            yield frame(internal_error().body())

    def _frames_of(self, step: Step) -> Iterable[str]:
        if not step:
            yield COMMENT
        for place, event in step:
            delta = self._take(place, event)
            if isinstance(event, Began):
                yield from self.shape.opening(self.reply, place)
            elif delta is not None:
                yield from self.shape.piece(self.reply, delta)

    def _take(self, place: int, event: Event) -> Delta | None:
        """Take an event; a row that came to its stop string is generated no further."""
        row = None if isinstance(event, Began) else self.reply.row(place, event.row)
        goes_on = row is not None and row.finish is None
        delta = self.reply.take(place, event)
        if row is not None and goes_on and row.stops.stopped and isinstance(event, NewToken) and not self.reply.over:
            self.answers.end_row(place, event.row)
        return delta

    def finish(self) -> None:
        """Let the engine go, and note what came of the request."""
        self.answers.cancel()
        record, reply = self.answers.record, self.reply
        record.prompt_tokens, record.tokens = reply.prompt_tokens, reply.tokens
        self.answers.front.metrics.prompt_tokens.inc(reply.prompt_tokens)
        if record.reason == "-" and reply.over:
            record.reason = str(reply.rows[0].finish)
        elif record.reason == "-":
            record.reason = "disconnect"


class EventStream(StreamingResponse):
    """Frames as they come. However it ends, the engine is asked to stop at once."""

    media_type = "text/event-stream"

    def __init__(self, run: Run, frames: AsyncIterator[str]) -> None:
        super().__init__(frames, headers=HEADERS)
        self._run = run

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream; a client that leaves, or does not read, ends it."""
        sending = asyncio.ensure_future(super().__call__(scope, receive, send))
        self._run.answers.cut_off = sending.cancel
        try:
            await sending
        except asyncio.CancelledError:
            if self._run.answers.record.reason != "slow reader":
                raise
        finally:
            sending.cancel()
            self._run.finish()


def frame(plain: JsonObject, event: str | None = None) -> str:
    """Return a server-sent event with JSON in it."""
    head = "" if event is None else f"event: {event}\n"
    return f"{head}data: {_encode(plain)}\n\n"
