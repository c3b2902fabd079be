"""``/v1/admin/keys``: keys are made, listed and revoked."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mplus.serving.errors import ServingError
from mplus.serving.http.bodies import Body, Id, read_body
from mplus.serving.http.front import FrontOf, caller_of, need
from mplus.serving.http.keys import DEFAULT_RIGHTS, Caller, Right


def _admin(request: Request, front: FrontOf) -> Caller:
    if front.keys.admin_key is None and not front.keys.needed:
        message = "keys are made by the holder of an admin key; start the server with --admin-key-file"
        raise ServingError(message, 403, "permission_error", code="no_admin_key")
    return need(caller_of(request), "admin")


router = APIRouter(dependencies=[Depends(_admin)])


class KeyBody(Body):
    """``POST /v1/admin/keys``."""

    tenant: Id
    rights: Annotated[list[Right], Field(min_length=1, fail_fast=True)] | None = None
    requests: Annotated[int, Field(ge=1, le=2**20)] | None = None


@router.post("/v1/admin/keys")
async def make_key(request: Request, front: FrontOf) -> Response:
    """Make a key; it is shown this once."""
    body = await read_body(request, KeyBody)
    rights = body.rights or DEFAULT_RIGHTS
    record, key = await asyncio.to_thread(front.keys.make, body.tenant, rights, body.requests)
    return JSONResponse({**record.public(), "key": key})


@router.get("/v1/admin/keys")
async def list_keys(front: FrontOf) -> Response:
    """List the valid keys, without the keys themselves."""
    return JSONResponse({"data": [record.public() for record in front.keys.list()]})


@router.delete("/v1/admin/keys/{key_id}")
async def revoke_key(key_id: str, front: FrontOf) -> Response:
    """Revoke a key at once."""
    if not await asyncio.to_thread(front.keys.revoke, key_id):
        raise ServingError("there is no such key", 404, "not_found_error", code="key_not_found")
    return JSONResponse({"id": key_id, "deleted": True})
