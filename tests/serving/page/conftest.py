"""A server with a page, and a browser to look at it, where there is one."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence

import pytest
from attrs import define

from tests.serving import browser

collect_ignore = ["test_browser.py"] if browser.missing() else []


@define(frozen=True)
class Served:
    """A server that runs, and the key of a tenant."""

    address: str
    key: str


@pytest.fixture(scope="module")
def chromium():
    with browser.chromium() as started:
        yield started


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Served]:
    """stories260K with memories of keys and values, for users with keys."""
    import uvicorn

    import mplus
    from mplus.hf.pretrained.shipped import load_decoder, load_tokenizer
    from mplus.serving.config import Limits, ServeConfig
    from mplus.serving.engine.client import InProcessEngine
    from mplus.serving.engine.decoder import ServedDecoder
    from mplus.serving.http.app import make_app
    from mplus.serving.http.keys import Keys

    folder = tmp_path_factory.mktemp("memories")
    model = mplus.wrap(load_decoder(), mplus.MPlusConfig(mechanism="kv", chunk_tokens=32))
    config = ServeConfig(memories=folder, limits=Limits(memories=8, disk_bytes=2**30))
    keys = Keys(folder / "keys.json", "the-admin-key-of-the-tests")
    client = InProcessEngine(ServedDecoder.of(model, load_tokenizer(), "stories260K"), config)
    served = uvicorn.Server(uvicorn.Config(make_app(client, config, keys), port=0, log_level="warning"))
    thread = threading.Thread(target=served.run, daemon=True)
    thread.start()
    while not served.started:
        time.sleep(0.02)
    port = served.servers[0].sockets[0].getsockname()[1]
    yield Served(f"http://127.0.0.1:{port}/", keys.make("anna")[1])
    served.should_exit = True
    thread.join()


@pytest.fixture
def tab(chromium, server) -> Iterator[object]:
    """A function that opens the page with a key; at the end, the console must have no error that was not expected."""
    said: list[str] = []
    allowed: list[str] = []
    with contextlib.ExitStack() as contexts:

        def opened(key: str = server.key, expected: Sequence[str] = (), **options):
            allowed.extend(expected)
            context = contexts.enter_context(contextlib.closing(chromium.new_context(**options)))
            page = context.new_page()
            page.set_default_timeout(20_000)
            page.on("console", lambda message: said.append(message.text) if message.type != "log" else None)
            page.on("pageerror", lambda error: said.append(str(error)))
            page.goto(server.address)
            page.get_by_role("textbox", name="Key").fill(key)
            page.get_by_role("button", name="Go on").click()
            if key == server.key:
                page.get_by_label("Memory in use").locator("option").first.wait_for(state="attached")
            return page

        yield opened
    assert [line for line in said if not any(word in line for word in allowed)] == []
