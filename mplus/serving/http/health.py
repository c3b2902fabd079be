"""The page, and routes that tell how the server is: ``/health``, ``/ready``, ``/metrics``."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mplus.serving.errors import ServingError
from mplus.serving.http.front import FrontOf, caller_of, need, shutting_down
from mplus.serving.page.page import page

router = APIRouter()


@router.get("/")
async def root() -> Response:
    """Return the page to chat with."""
    made = page()
    return Response(made.body, headers=dict(made.headers))


@router.get("/health")
async def health(front: FrontOf) -> Response:
    """Say that the process answers, and whether it asks for keys: the page looks here before it asks for one."""
    return JSONResponse({"status": "ok", "keys": front.keys.needed})


@router.get("/ready")
async def ready(front: FrontOf) -> Response:
    """Say whether requests are answered: 503 while the decoder is not there, and when the server ends."""
    if front.draining:
        raise shutting_down()
    await front.client.model()
    await front.decoder()
    return JSONResponse({"status": "ready"})


@router.get("/metrics")
async def metrics(request: Request, front: FrontOf) -> Response:
    """Return the metrics for Prometheus; with the admin key only, where there are keys and they are not open."""
    if front.keys.needed and not front.metrics_open:
        need(caller_of(request), "admin")
    try:
        engine = await front.client.metrics()
    except ServingError:
        engine = {}  # the front's own counts are of use most of all while there is no engine
    return Response(front.metrics.text(engine), media_type=CONTENT_TYPE_LATEST)
