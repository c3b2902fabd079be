"""``/v1/memories``: memories are made, listed, described and deleted; ``/v1/usage``."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mplus.serving.http.bodies import Body, Id, read_body
from mplus.serving.http.errors import bad_request
from mplus.serving.http.front import FrontOf, Reader, Writer
from mplus.serving.http.memories.names import path_memory
from mplus.serving.messages import (
    DeleteMemory,
    DescribeMemory,
    DescribeUsage,
    ForkMemory,
    ListMemories,
    MakeMemory,
    MemoryName,
    SearchMemory,
)

router = APIRouter()
MOST_LISTED, LISTED = 1000, 100
ROUTE = "/v1/memories/{memory_id}"


class MakeBody(Body):
    """``POST /v1/memories`` and ``.../fork``."""

    id: Id


class SearchBody(Body):
    """``POST /v1/memories/{id}/search``."""

    text: Annotated[str, Field(min_length=1)]
    k: Annotated[int, Field(ge=1, le=100)] = 4


@router.post("/v1/memories")
async def make(request: Request, front: FrontOf, caller: Writer) -> Response:
    """Make an empty memory."""
    body = await read_body(request, MakeBody)
    return JSONResponse(await front.call(MakeMemory(MemoryName(caller.tenant, body.id))))


@router.get("/v1/memories")
async def list_memories(request: Request, front: FrontOf, caller: Reader) -> Response:
    """List memories in order of making, page by page."""
    asked = request.query_params
    if unknown := sorted(set(asked) - {"limit", "after"}):
        raise bad_request(f"unknown parameter: {unknown[0][:100]}", unknown[0][:100], "unknown_field")
    after = asked.get("after") or None
    return JSONResponse(await front.call(ListMemories(caller.tenant, _limit(asked.get("limit")), after)))


@router.get(ROUTE)
async def describe(memory_id: str, front: FrontOf, caller: Reader) -> Response:
    """Describe a memory."""
    return JSONResponse(await front.call(DescribeMemory(path_memory(caller, memory_id))))


@router.delete(ROUTE)
async def delete(memory_id: str, front: FrontOf, caller: Writer) -> Response:
    """Delete a memory."""
    return JSONResponse(await front.call(DeleteMemory(path_memory(caller, memory_id))))


@router.post(f"{ROUTE}/fork")
async def fork(memory_id: str, request: Request, front: FrontOf, caller: Writer) -> Response:
    """Copy a memory to a new id."""
    memory = path_memory(caller, memory_id)
    body = await read_body(request, MakeBody)
    return JSONResponse(await front.call(ForkMemory(memory, body.id)))


@router.post(f"{ROUTE}/search")
async def search(memory_id: str, request: Request, front: FrontOf, caller: Reader) -> Response:
    """Say what a read would bring back."""
    memory = path_memory(caller, memory_id)
    body = await read_body(request, SearchBody)
    await (await front.decoder()).tokenizer.prompt(body.text, "text")  # a decoder reads it, as a prompt
    return JSONResponse(await front.call(SearchMemory(memory, body.text, body.k)))


@router.get("/v1/usage")
async def usage(front: FrontOf, caller: Reader) -> Response:
    """Say how many memories and bytes the caller's tenant has, and its limits."""
    return JSONResponse(await front.call(DescribeUsage(caller.tenant)))


def _limit(text: str | None) -> int:
    if text is None:
        return LISTED
    if not (text.isascii() and text.isdecimal() and len(text) < 8 and 1 <= int(text) <= MOST_LISTED):
        raise bad_request(f"limit must be a whole number from 1 to {MOST_LISTED}", "limit", "invalid_value")
    return int(text)
