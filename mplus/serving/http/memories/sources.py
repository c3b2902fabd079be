"""Routes for the sources of a memory: what was written to it."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from mplus.serving.http.front import FrontOf, Reader, Writer
from mplus.serving.http.memories.names import path_memory, path_source
from mplus.serving.http.memories.routes import ROUTE
from mplus.serving.messages import ForgetSource, ListSources, ReadSource

router = APIRouter()


@router.get(f"{ROUTE}/sources")
async def sources(memory_id: str, front: FrontOf, caller: Reader) -> Response:
    """List what was written, in order of writing."""
    return JSONResponse(await front.call(ListSources(path_memory(caller, memory_id))))


@router.delete(f"{ROUTE}/sources/{{name}}")
async def forget(memory_id: str, name: str, front: FrontOf, caller: Writer) -> Response:
    """Forget all that was written under a name."""
    return JSONResponse(await front.call(ForgetSource(path_memory(caller, memory_id), path_source(name))))


@router.get(f"{ROUTE}/sources/{{name}}/text")
async def text(memory_id: str, name: str, front: FrontOf, caller: Reader) -> Response:
    """Return the words of a source, where the memory keeps them."""
    return JSONResponse(await front.call(ReadSource(path_memory(caller, memory_id), path_source(name))))
