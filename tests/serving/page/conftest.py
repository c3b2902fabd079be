"""A server with a page, and a browser to look at it, where there is one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import pytest

from tests.serving import browser
from tests.serving.served import Served, served

collect_ignore = ["test_browser.py"] if browser.missing() else []


@pytest.fixture(scope="module")
def chromium():
    with browser.chromium() as started:
        yield started


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Served]:
    """A server for users with keys."""
    with served(tmp_path_factory.mktemp("memories"), keys=True) as running:
        yield running


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
