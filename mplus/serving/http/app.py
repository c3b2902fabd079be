"""make_app: the HTTP server as an ASGI application."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from mplus.serving.config import ServeConfig
from mplus.serving.http import admin, health
from mplus.serving.http.errors import install_error_handlers
from mplus.serving.http.front import Front
from mplus.serving.http.gate import Gate
from mplus.serving.http.keys import Keys
from mplus.serving.http.memories import copies, sources, writes
from mplus.serving.http.memories import routes as memories
from mplus.serving.http.openai import chat, completions, models, responses
from mplus.serving.messages import EngineClient

ROUTERS = [
    health.router, models.router, chat.router, completions.router, responses.router, memories.router, writes.router,
    sources.router, copies.router, admin.router,
]  # fmt: skip


def make_app(client: EngineClient, config: ServeConfig, keys: Keys, *, metrics_open: bool = False) -> FastAPI:
    """Return the server as an ASGI application; when it ends, it closes the engine.

    Args:
        client: of the engine.
        config: limits and folders.
        keys: who may do what.
        metrics_open: let everyone see ``/metrics``.

    Example:
        >>> app = make_app(engine, ServeConfig(memories=folder), Keys(folder / "keys.json"))
        >>> uvicorn.run(app, host="127.0.0.1")
    """
    front = Front(client, config, keys, metrics_open)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await client.close()

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False, lifespan=lifespan)
    app.state.front = front
    app.add_middleware(Gate, front=front)
    install_error_handlers(app)
    for router in ROUTERS:
        app.include_router(router)
    return app
