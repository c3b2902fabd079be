"""make_server: uvicorn around the app, which ends in order: answers first, then connections, then memories."""

from __future__ import annotations

import asyncio
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from mplus.serving.http.front import Front
from mplus.serving.http.sockets.connections import PatientProtocol

LONGEST_HEAD = 2**16
"""Bytes of a request's line and headers: a source's name in a path may take 12 KiB."""


class DrainingServer(uvicorn.Server):
    """A server that goes on answering while it ends, so that those who ask are told; a second signal ends it at once.

    Args:
        config: of uvicorn.
        front: of the app.
        grace: seconds that answers which have begun may take.
    """

    def __init__(self, config: uvicorn.Config, front: Front, grace: float) -> None:
        super().__init__(config)
        self._front, self._grace = front, grace
        self._ending: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal comes."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end at the first signal; end at once at the second."""
        if self._loop is None or self._front.draining:
            super().handle_exit(sig, frame)
        else:
            self._front.draining = True
            self._loop.call_soon_threadsafe(self._begin_to_end)

    def _begin_to_end(self) -> None:
        self._ending = asyncio.ensure_future(self._end())

    async def _end(self) -> None:
        await self._front.drain(self._grace)
        self.should_exit = True


def make_server(app: FastAPI, *, grace: float = 30.0) -> DrainingServer:
    """Return a server, which runs until SIGTERM or SIGINT.

    Args:
        app: of ``make_app``.
        grace: seconds that answers which have begun may take, when a signal has come.

    Example:
        >>> make_server(app).run([listen("127.0.0.1", 8000)])
    """
    config = uvicorn.Config(
        app,
        http=PatientProtocol,
        log_config=None,
        access_log=False,  # one line for each request is written by the app
        lifespan="on",
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=5,
        timeout_keep_alive=60,
        h11_max_incomplete_event_size=LONGEST_HEAD,
    )
    return DrainingServer(config, app.state.front, grace)
