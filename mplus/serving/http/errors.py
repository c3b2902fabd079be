"""Errors as HTTP answers: every one is an object in OpenAI's form, without a traceback or a path of the server."""

from __future__ import annotations

from fastapi import FastAPI, Request
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import Scope

from mplus.serving.errors import Kind, ServingError

KINDS: dict[int, tuple[Kind, str]] = {
    401: ("authentication_error", "invalid_api_key"),
    403: ("permission_error", "permission_denied"),
    404: ("not_found_error", "unknown_route"),
    405: ("invalid_request_error", "method_not_allowed"),
}
"""Type and code of the errors that the web framework raises, by status."""
TYPES = {"str", "int", "float", "bool"}
SHOWN = 100
"""Characters of a client's own words that an error message repeats."""


def error_response(error: ServingError) -> Response:
    """Return the HTTP answer that says why a request was refused."""
    headers = {} if error.facts.retry_after is None else {"retry-after": str(error.facts.retry_after)}
    if error.facts.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error.body(), error.facts.status, headers)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ServingError:
    """Return the error of a request that breaks a rule (400)."""
    return ServingError(message, 400, "invalid_request_error", param=param, code=code)


def internal_error() -> ServingError:
    """Return the error of a request that the server failed at (500); the log has what happened."""
    return ServingError("the server failed; its log has the request id", 500, "server_error", code="internal_error")


def validation_error(error: ValidationError, prefix: str | None = None) -> ServingError:
    """Return the error (400) that names the first field which breaks its rule.

    Args:
        error: of pydantic.
        prefix: the top-level field that was validated; None: all of the body was.
    """
    found = error.errors(include_url=False, include_input=False, include_context=False)
    # Where a field may be of several types, the one that was meant is that which fits furthest.
    first = max((one for one in found if one["loc"][:1] == found[0]["loc"][:1]), key=lambda one: len(one["loc"]))
    place = [prefix, *first["loc"]] if prefix else list(first["loc"])
    # In a place, pydantic names the types that it tried, too: those are no fields.
    names = [str(part) for part in place if not (isinstance(part, str) and (part in TYPES or "[" in part))]
    param = names[0][:SHOWN] if names else None
    where = ".".join(names)[:SHOWN] or "the body"
    if first["type"] == "extra_forbidden":
        return bad_request(f"unknown field: {where}", param, "unknown_field")
    message = first["msg"].removeprefix("Value error, ")
    return bad_request(f"{where}: {message[:1].lower()}{message[1:]}", param, "invalid_value")


def install_error_handlers(app: FastAPI) -> None:
    """Let the app answer every error that its routes raise in OpenAI's form."""

    @app.exception_handler(ServingError)
    async def serving(_: Request, error: ServingError) -> Response:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        return error_response(_of_framework(error, request.scope))


def _of_framework(error: HTTPException, scope: Scope) -> ServingError:
    other: tuple[Kind, str | None] = ("server_error" if error.status_code >= 500 else "invalid_request_error", None)
    kind, code = KINDS.get(error.status_code, other)
    message = {
        404: f"there is no route {scope['path'][:SHOWN]}",
        405: f"{scope['path'][:SHOWN]} does not take {scope['method'][:SHOWN]}",
    }.get(error.status_code, error.detail)
    return ServingError(message, error.status_code, kind, code=code)
