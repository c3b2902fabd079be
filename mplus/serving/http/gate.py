"""Gate: what every request goes through before it is read, and how it ends in the log."""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
import uuid
from contextlib import suppress
from ipaddress import ip_address
from urllib.parse import urlsplit

from attrs import define
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mplus.errors import ConfigError
from mplus.serving.errors import ServingError
from mplus.serving.http.errors import error_response, internal_error
from mplus.serving.http.front import Front, shutting_down
from mplus.serving.http.keys import LOCAL_TENANT, RIGHTS, Caller
from mplus.serving.http.record import RequestRecord, logger

FREE = {"/", "/health", "/ready"}
"""Paths that need no key."""
UNLIMITED = re.compile(r"/v1/memories/[^/]+/import")
"""Paths with a limit of their own: that of the tenant's disk."""
BODY_SECONDS = 60.0
"""Time that a client has for its body, besides that of its bytes."""
SLOWEST = 2**14
"""Bytes of a body that come in a second at least, on the whole."""
WHILE_DRAINING = {"/health", "/ready", "/metrics"}
REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@define(eq=False)
class Gate:
    """Middleware around everything: request ids, keys, and an answer and a line of the log for whatever happens.

    Keys are looked at before the body is read. Paths reach the routes as they were sent, percent-encoded, so that a
    ``/`` in a name stays in the name.
    """

    app: ASGIApp
    front: Front

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        record = RequestRecord(given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex, scope["method"])
        scope.setdefault("state", {})["record"] = record
        scope["path"] = scope.get("raw_path", scope["path"].encode()).decode("latin-1")
        started = False

        async def sending(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started, record.status = True, message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", record.id.encode())]
            await send(message)

        counted = scope["path"] not in WHILE_DRAINING
        self.front.requests += counted
        try:
            scope["state"]["caller"] = caller = self._caller(scope["path"], headers)
            # The log names nobody; with the hash of a name, its lines are found.
            record.tenant = hashlib.sha256(caller.tenant.encode()).hexdigest()[:12]
            with self.front.counted(caller):
                await self.app(scope, self._limited(scope["path"], headers, receive), sending)
        except ServingError as error:
            await error_response(error)(scope, receive, sending)
        except asyncio.CancelledError:
            if started or not self.front.draining:
                raise
            record.reason = "cancelled"  # uvicorn's patience is over
            await error_response(shutting_down())(scope, receive, sending)
        except ClientDisconnect:
            record.reason = "disconnect"
        except Exception:
            logger.exception("request id=%s failed", record.id)
            record.reason = "error"
            if started:
                raise  # the connection is closed, as the answer cannot be mended
            await error_response(internal_error())(scope, receive, sending)
        finally:
            self.front.requests -= counted
            self._end(record, scope)

    def _caller(self, path: str, headers: Headers) -> Caller:
        """Return whom a request comes from. Raises ServingError: it may not come in."""
        if self.front.draining and path not in WHILE_DRAINING:
            raise shutting_down()
        try:
            return self._holder(path, headers)
        except ConfigError as error:
            logger.error("nobody can be let in: %s", error)
            message = "the server cannot read its file of keys, and lets nobody in: tell who runs it"
            raise ServingError(message, 503, "server_error", code="keys_unreadable", retry_after=5) from error

    def _holder(self, path: str, headers: Headers) -> Caller:
        if not self.front.keys.needed:
            _check_local(headers)
            return Caller(LOCAL_TENANT, RIGHTS[:2])
        if path in FREE or (path == "/metrics" and self.front.metrics_open):
            return Caller("", ())
        scheme, _, key = headers.get("authorization", "").partition(" ")
        caller = self.front.keys.caller(key.strip()) if scheme.lower() == "bearer" else None
        if caller is None:
            message = "a valid API key is needed, as in 'Authorization: Bearer mp-...'"
            raise ServingError(message, 401, "authentication_error", code="invalid_api_key")
        return caller

    def _limited(self, path: str, headers: Headers, receive: Receive) -> Receive:
        """Return ``receive`` up to the limits of a body, in bytes and time. Raises ServingError (413): it says more.

        What is returned raises it where more comes (413), or what there is does not come in time (408).
        """
        most, size, whole = self.front.config.limits.body_bytes, 0, False
        begun, unlimited = time.monotonic(), UNLIMITED.fullmatch(path) is not None
        message = f"the body must have at most {most} bytes"
        error = ServingError(message, 413, "invalid_request_error", code="request_too_large")
        declared = headers.get("content-length", "")
        long = declared.isascii() and declared.isdecimal() and (len(declared) > 18 or int(declared) > most)
        if long and not unlimited:
            raise error

        async def counting() -> Message:
            nonlocal size, whole
            left = None if whole else begun + BODY_SECONDS + size / SLOWEST - time.monotonic()
            try:
                async with asyncio.timeout(left):
                    event = await receive()
            except TimeoutError as late:
                message = f"the body did not come within {BODY_SECONDS:.0f} s and {SLOWEST} bytes a second"
                raise ServingError(message, 408, "invalid_request_error", code="request_timeout") from late
            size += len(event.get("body", b""))
            whole = whole or not event.get("more_body", False)
            if size > most and not unlimited:
                raise error
            return event

        return counting

    def _end(self, record: RequestRecord, scope: Scope) -> None:
        record.route = getattr(scope.get("route"), "path", "unknown")
        if record.reason in {"-", "disconnect"} and record.status >= 400:  # who got an error was still there
            record.reason = "disconnect" if record.status == 499 else "error"
        record.write()
        self.front.metrics.requests.labels(record.route, str(record.status), record.reason).inc()


def _check_local(headers: Headers) -> None:
    """Let in only what was sent to this machine by its own programs: a server without keys trusts them all.

    A web page of elsewhere could reach it through the browser: under a host name of its own that leads here, or as a
    request that says where it comes from.
    """
    host, origin = headers.get("host", ""), headers.get("origin")
    local = False
    with suppress(ValueError):  # no address, but the name of another machine, or none at all
        name = urlsplit(f"//{host}").hostname or ""
        local = name == "localhost" or ip_address(name).is_loopback
    if local and origin in (None, f"http://{host}"):
        return
    message = "without keys this server answers programs of this machine only; start it with --admin-key-file"
    raise ServingError(message, 403, "permission_error", code="not_local")
