"""Routes that take a memory out as one stream, and in again."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastapi import APIRouter
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from mplus.serving.drafts import new_draft
from mplus.serving.errors import ServingError
from mplus.serving.http.front import Front, FrontOf, Reader, Writer
from mplus.serving.http.memories.names import path_memory
from mplus.serving.http.memories.routes import ROUTE
from mplus.serving.messages import DescribeMemory, DescribeUsage, ExportMemory, ImportMemory

router = APIRouter()
BUFFER = 2**20


@router.get(f"{ROUTE}/export")
async def export(memory_id: str, front: FrontOf, caller: Reader) -> Response:
    """Send a snapshot of a memory."""
    memory = path_memory(caller, memory_id)
    file = _new_file(front)
    try:
        await front.call(ExportMemory(memory, str(file)))
    except BaseException:
        file.unlink(missing_ok=True)
        raise
    name = f"{memory.id.replace(':', '_')}.mplus"
    done = BackgroundTask(file.unlink, missing_ok=True)
    return FileResponse(file, media_type="application/octet-stream", filename=name, background=done)


@router.post(f"{ROUTE}/import")
async def import_memory(memory_id: str, request: Request, front: FrontOf, caller: Writer) -> Response:
    """Take an exported memory into a made, empty one."""
    memory = path_memory(caller, memory_id)
    await front.call(DescribeMemory(memory))
    room = await _room(front, caller.tenant)
    _check_room(int(request.headers.get("content-length", "0") or 0), room)
    file = _new_file(front)
    try:
        await _receive(request, file, room)
        return JSONResponse(await front.call(ImportMemory(memory, str(file))))
    finally:
        file.unlink(missing_ok=True)


async def _receive(request: Request, file: Path, room: int | None) -> None:
    """Write the body to a file, in the pieces in which it comes."""
    size, pending = 0, bytearray()
    with file.open("wb") as opened, _disk_errors():
        async for piece in request.stream():
            size += len(piece)
            _check_room(size, room)
            pending += piece
            if len(pending) >= BUFFER:
                await asyncio.to_thread(opened.write, bytes(pending))
                pending.clear()
        await asyncio.to_thread(opened.write, bytes(pending))


async def _room(front: Front, tenant: str) -> int | None:
    """Return the bytes that a tenant may still have on the disk; None: there is no limit."""
    limit = front.config.limits.disk_bytes
    if limit is None:
        return None
    used = (await front.call(DescribeUsage(tenant))).get("disk_bytes", 0)
    return max(limit - (used if isinstance(used, int) else 0), 0)


def _check_room(size: int, room: int | None) -> None:
    if room is not None and size > room:
        message = f"the tenant has room for {room} bytes more on the disk"
        raise ServingError(message, 413, "invalid_request_error", code="quota_exceeded")


def _new_file(front: Front) -> Path:
    with _disk_errors():
        return new_draft(front.config.memories)


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
        message = "the server's disk is full" if full else "the server's disk cannot be written"
        code = "insufficient_storage" if full else "disk_failed"
        raise ServingError(message, 507, "server_error", code=code) from error
