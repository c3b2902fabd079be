"""Routes that take a memory out as one stream, and in again."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attrs import define
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
async def export(memory_id: str, request: Request, front: FrontOf, caller: Reader) -> Response:
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
    # The next request sends another snapshot, of which no range would fit to this one.
    request.scope["headers"] = [(key, value) for key, value in request.scope["headers"] if key != b"range"]
    headers = {"accept-ranges": "none"}
    return FileResponse(file, headers=headers, media_type="application/octet-stream", filename=name, background=done)


@router.post(f"{ROUTE}/import")
async def import_memory(memory_id: str, request: Request, front: FrontOf, caller: Writer) -> Response:
    """Take an exported memory into a made, empty one."""
    memory = path_memory(caller, memory_id)
    await front.call(DescribeMemory(memory))
    room = Room(front, caller.tenant, await _room(front, caller.tenant))
    room.check(int(request.headers.get("content-length", "0") or 0))
    file = _new_file(front)
    try:
        await _receive(request, file, room)
        return JSONResponse(await front.call(ImportMemory(memory, str(file))))
    finally:
        file.unlink(missing_ok=True)
        room.give()


@define(eq=False)
class Room:
    """The room for a body that a tenant sends, besides those that it sends at the same time.

    Attributes:
        front: counts the bytes of all.
        tenant: whose they are.
        bytes: that all may have; None: there is no limit.
        size: of this body, so far.
    """

    front: Front
    tenant: str
    bytes: int | None
    size: int = 0

    def check(self, more: int) -> None:
        """Raise ServingError (413) where there is no room for so many bytes more."""
        if self.bytes is not None and self.front.incoming[self.tenant] + more > self.bytes:
            message = f"the tenant has room for {self.bytes} bytes more on the disk, for all that it sends now"
            raise ServingError(message, 413, "invalid_request_error", code="quota_exceeded")

    def take(self, more: int) -> None:
        """Count so many bytes more. Raises ServingError (413)."""
        self.check(more)
        self.size += more
        self.front.incoming[self.tenant] += more

    def give(self) -> None:
        """Count the body no more."""
        self.front.incoming[self.tenant] -= self.size
        self.size = 0
        if not self.front.incoming[self.tenant]:
            del self.front.incoming[self.tenant]


async def _receive(request: Request, file: Path, room: Room) -> None:
    """Write the body to a file, in the pieces in which it comes."""
    pending = bytearray()
    with _disk_errors(), file.open("wb") as opened:  # closing writes, too
        async for piece in request.stream():
            room.take(len(piece))
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
