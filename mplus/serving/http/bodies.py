"""Bodies: JSON, parsed strictly and validated; every fault is an error 400 that names it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import Annotated, ClassVar, TypeVar

import pydantic_core
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from starlette.requests import Request

from mplus.config import JsonValue
from mplus.serving.errors import ServingError
from mplus.serving.http.errors import SHOWN, bad_request, validation_error

MEMORY_ID = r"\A[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}\Z"

LONG = 2**16
"""Bytes from which on a body is looked through in a thread."""

M = TypeVar("M", bound="Body")


class Body(BaseModel):
    """A JSON object with strict types; a field that it does not have is an error.

    Lists in it are to be ``Field(fail_fast=True)``: with a million of faults in one, a client is told of the first, and
    error objects of all of them would take gigabytes.

    Attributes:
        unsupported: names of OpenAI's fields that mean something which this server does not do. Null or an empty list
            in them mean nothing: clients send back an answer with all that it did not have.
    """

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, regex_engine="python-re")
    unsupported: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _only_supported(cls, value: JsonValue) -> JsonValue:
        if not isinstance(value, dict):
            return value
        if name := cls.refused(value):
            raise ValueError(f"{name} is not supported")
        unknown = next((name for name in value if name not in cls.model_fields and name not in cls.unsupported), None)
        # One of them is enough to be refused; a million of them would take a gigabyte of error objects.
        return {name: one for name, one in value.items() if name in cls.model_fields or name == unknown}

    def check(self) -> None:
        """Check what fields have to do with each other. Raises ServingError (400)."""

    @classmethod
    def refused(cls, value: Mapping[str, JsonValue]) -> str | None:
        """Return the first field of an object that this server does not have; None: there is none."""
        return next((name for name, one in value.items() if name in cls.unsupported and one not in (None, [])), None)


def _id_text(value: JsonValue) -> JsonValue:
    if isinstance(value, str) and len(value) > 128:
        raise ValueError("must have at most 128 characters")
    return value


Id = Annotated[str, BeforeValidator(_id_text), Field(pattern=MEMORY_ID)]
"""A name of a memory or a tenant; never a path."""


def is_id(text: str) -> bool:
    """Return whether a text may be the id of a memory or the name of a tenant."""
    return re.fullmatch(MEMORY_ID, text) is not None


async def read_body(request: Request, kind: type[M]) -> M:
    """Return the body of a request.

    Raises:
        ServingError: it is no JSON (400, 415), breaks a rule of its fields (400), is too long (413), or comes too
            slowly (408).
    """
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":
        # Other types would let a page of another site post to a server on this machine.
        message = f"content-type must be application/json, got {media[:SHOWN] or 'none'}"
        raise ServingError(message, 415, "invalid_request_error", code="unsupported_media_type")
    raw = await request.body()
    if len(raw) < LONG:
        return validated(kind, parse(raw))
    return await asyncio.to_thread(lambda: validated(kind, parse(raw)))


def parse(raw: bytes) -> dict[str, JsonValue]:
    """Return the object that JSON text holds: no NaN, no lone surrogates, not deeper than 200. Raises ServingError."""
    try:
        plain = pydantic_core.from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise bad_request(f"the body must be JSON: {error}", code="invalid_json") from error
    if not isinstance(plain, dict):
        kind = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}.get(type(plain), "a number")
        raise bad_request(f"the body must be a JSON object, got {kind}", code="invalid_json")
    return plain


def validated(kind: type[M], plain: dict[str, JsonValue]) -> M:
    """Return an object as a body of its kind. Raises ServingError (400)."""
    if name := kind.refused(plain):
        raise bad_request(f"{name} is not supported by this server", name, "unsupported_parameter")
    try:
        body = kind.model_validate(plain)
    except ValidationError as error:
        raise validation_error(error) from error
    body.check()
    return body
