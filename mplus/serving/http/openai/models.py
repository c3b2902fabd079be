"""``/v1/models``: the one decoder that there is."""

from __future__ import annotations

from urllib.parse import unquote

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from mplus.serving.http.front import Decoder, FrontOf, Reader
from mplus.serving.http.openai.running import JsonObject

router = APIRouter()


@router.get("/v1/models")
async def models(front: FrontOf, caller: Reader) -> Response:
    """List the decoder."""
    return JSONResponse({"object": "list", "data": [_plain(await front.decoder())]})


@router.get("/v1/models/{name:path}")
async def model(name: str, front: FrontOf, caller: Reader) -> Response:
    """Describe the decoder by its name."""
    return JSONResponse(_plain(await front.served(unquote(name))))


def _plain(decoder: Decoder) -> JsonObject:
    facts = decoder.facts
    return {
        "id": facts.name,
        "object": "model",
        "created": facts.created,
        "owned_by": "mplus",
        "chat_template": decoder.tokenizer.has_template,
        "context_length": facts.context,
        "mechanism": facts.mechanism,
    }
