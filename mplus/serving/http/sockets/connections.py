"""PatientProtocol: a connection of uvicorn's whose client may be slow, and not for ever."""

from __future__ import annotations

import asyncio
import json

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from mplus.serving.errors import ServingError
from mplus.serving.http.errors import bad_request

HEAD_SECONDS = 30.0
"""Time in which the line and the headers of a request must have come, from the connection or their first byte on."""
READ_SECONDS, READ_BYTES = 60.0, 2**14
"""A client that is behind must read so many bytes, or all that is left, in so many seconds."""


class PatientProtocol(H11Protocol):
    """HTTP/1.1, with limits in time where uvicorn has none; see ``uvicorn.Config.http``.

    A head that comes too slowly is answered by 408, and a connection the client of which does not read is aborted, so
    that neither takes a descriptor for longer. Bodies have a limit of their own (``Gate``).
    """

    _head: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None
    _behind: int = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """Take bytes; those of a head must be followed by its end in time."""
        super().data_received(data)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the limits."""
        super().connection_lost(exc)
        self._stop_head()
        self._stop_unread()

    def pause_writing(self) -> None:
        """Wait for the client to read; called where more than enough is written."""
        super().pause_writing()
        self._expect_reading()

    def resume_writing(self) -> None:
        """Go on: it has read."""
        super().resume_writing()
        self._stop_unread()

    def on_response_complete(self) -> None:
        """Wait for the client to read the end of an answer as well."""
        super().on_response_complete()
        if self.transport.get_write_buffer_size():
            self._expect_reading()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, or has too long a head."""
        self._refuse(bad_request(msg.rstrip("."), code="invalid_http"))

    def _expect_head(self) -> None:
        if self.transport.is_closing() or self.conn.their_state is not h11.IDLE:
            self._stop_head()
        elif self._head is None:
            self._head = self.loop.call_later(HEAD_SECONDS, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head = None
        if not self.transport.is_closing() and self.conn.their_state is h11.IDLE:
            message = f"the headers did not come within {HEAD_SECONDS:.0f} s"
            self._refuse(ServingError(message, 408, "invalid_request_error", code="request_timeout"))

    def _refuse(self, error: ServingError) -> None:
        """Answer in the place of the app, and close the connection."""
        body = json.dumps(error.body()).encode()
        status = error.facts.status
        lines = [
            f"HTTP/1.1 {status} {'Request Timeout' if status == 408 else 'Bad Request'}",
            "content-type: application/json", f"content-length: {len(body)}", "connection: close",
        ]  # fmt: skip
        self.transport.write("".join(f"{line}\r\n" for line in lines).encode() + b"\r\n" + body)
        self.transport.close()
        if self.transport.get_write_buffer_size():
            self._expect_reading()

    def _expect_reading(self) -> None:
        if self._unread is None:
            self._behind = self.transport.get_write_buffer_size()
            self._unread = self.loop.call_later(READ_SECONDS, self._look_at_unread)

    def _look_at_unread(self) -> None:
        self._unread, left = None, self.transport.get_write_buffer_size()
        if left > self._behind - READ_BYTES and left:
            self.transport.abort()
        elif left:
            self._expect_reading()

    def _stop_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _stop_unread(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None
