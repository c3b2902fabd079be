"""Chromium, headless, where it and Playwright are installed: `make test-serving` installs both."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser

CHROMIUM = os.environ.get("MPLUS_CHROMIUM") or shutil.which("chromium")


def missing() -> list[str]:
    """Return what a browser's tests need and is not there."""
    return [
        name
        for name, there in (("chromium", CHROMIUM), ("playwright", importlib.util.find_spec("playwright")))
        if not there
    ]


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Start the browser; without its sandbox, which needs rights that a container does not give."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()
