"""Routes that write to a memory."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import APIRouter
from pydantic import Field, field_validator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mplus.serving.http.bodies import Body, read_body
from mplus.serving.http.errors import bad_request
from mplus.serving.http.front import FrontOf, Writer
from mplus.serving.http.memories.names import LONGEST_SOURCE, path_memory
from mplus.serving.http.memories.routes import ROUTE
from mplus.serving.http.openai.schemas import MOST_MESSAGES, ChatMessage
from mplus.serving.messages import FlushMemory, WriteMemory

router = APIRouter()
KEY = re.compile(r"[\x21-\x7e]{1,255}")
YEARS_100 = 100 * 366 * 86400


class WriteBody(Body):
    """``POST /v1/memories/{id}/write``: a text, or messages."""

    text: Annotated[str, Field(min_length=1)] | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)] | None = None
    source: Annotated[str, Field(min_length=1, max_length=LONGEST_SOURCE)]
    expires: Annotated[float, Field(gt=0, le=YEARS_100)] | str | None = None
    pin: bool | None = None

    @property
    def data(self) -> str | list[dict[str, str]]:
        """Text or messages to be written."""
        return self.text or [message.plain() for message in self.messages or []]

    @field_validator("text")
    @classmethod
    def _words(cls, text: str | None) -> str | None:
        if text is not None and not text.strip():
            raise ValueError("must have words")
        return text

    @field_validator("source")
    @classmethod
    def _addressable(cls, source: str) -> str:
        if source in {".", ".."}:
            raise ValueError("must not be '.' or '..', which no path can name")
        return source

    def check(self) -> None:
        """Check what fields have to do with each other. Raises ServingError (400)."""
        if (self.text is None) == (self.messages is None):
            raise bad_request("text or messages must be given, and not both", "text", "invalid_value")


@router.post(f"{ROUTE}/write")
async def write(memory_id: str, request: Request, front: FrontOf, caller: Writer) -> Response:
    """Write to a memory; under an ``Idempotency-Key`` once, whatever is repeated."""
    memory, write_id = path_memory(caller, memory_id), _idempotency_key(request)
    body = await read_body(request, WriteBody)
    command = WriteMemory(memory, body.data, body.source, body.expires, bool(body.pin), write_id)
    return JSONResponse(await front.call(command))


@router.post(f"{ROUTE}/flush")
async def flush(memory_id: str, front: FrontOf, caller: Writer) -> Response:
    """Write what waits for a chunk to be full."""
    return JSONResponse(await front.call(FlushMemory(path_memory(caller, memory_id))))


def _idempotency_key(request: Request) -> str | None:
    key = request.headers.get("idempotency-key")
    if key is not None and not KEY.fullmatch(key):
        raise bad_request(
            "Idempotency-Key must be 1 to 255 visible ASCII characters", "Idempotency-Key", "invalid_value"
        )
    return key
