"""A server in this process, as `mplus serve --in-process` starts one."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import define

if TYPE_CHECKING:
    from mplus.serving.engine.decoder import ServedDecoder

ADMIN = "the-admin-key-of-the-tests"


@define(frozen=True)
class Served:
    """A server that runs: its address, which ends with a slash, and the key of a tenant (empty: none is needed)."""

    address: str
    key: str


def stories() -> ServedDecoder:
    """stories260K with memories of keys and values."""
    import mplus
    from mplus.hf.pretrained.shipped import load_decoder, load_tokenizer
    from mplus.serving.engine.decoder import ServedDecoder

    model = mplus.wrap(load_decoder(), mplus.MPlusConfig(mechanism="kv", chunk_tokens=32))
    return ServedDecoder.of(model, load_tokenizer(), "stories260K")


@contextlib.contextmanager
def served(folder: Path, *, keys: bool, decoder: ServedDecoder | None = None) -> Iterator[Served]:
    """Serve a decoder, or ``stories``, with memories in a folder."""
    import uvicorn

    from mplus.serving.config import Limits, ServeConfig
    from mplus.serving.engine.client import InProcessEngine
    from mplus.serving.http.app import make_app
    from mplus.serving.http.keys import Keys

    config = ServeConfig(memories=folder, limits=Limits(memories=8, disk_bytes=2**30))
    client = InProcessEngine(decoder or stories(), config)
    known = Keys(folder / "keys.json", ADMIN if keys else None)
    server = uvicorn.Server(uvicorn.Config(make_app(client, config, known), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Served(f"http://127.0.0.1:{port}/", known.make("anna")[1] if keys else "")
    finally:
        server.should_exit = True
        thread.join()
