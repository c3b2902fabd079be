"""The section on memories of text in "Write a mechanism", done as it says; its classes keep to the rules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from mplus.mechanisms import MECHANISMS
from mplus.testing.mechanisms import TextMechanismConformance
from tests.helpers.pages import BLOCK, DOCS, run_page

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PAGE = (DOCS / "write-a-mechanism.md").read_text(encoding="utf-8")
SECTION = PAGE.partition("\n## A memory of text\n")[2].partition("\n## ")[0]


def classes() -> dict[str, Any]:
    """The classes of the section, without running the rest of it."""
    found: dict[str, Any] = {}
    for block in BLOCK.finditer(SECTION):
        if block["text"].startswith(("class ", "from ")):
            exec(block["text"].replace("MECHANISMS.register", "print"), found)
    return found


@pytest.fixture
def unregistered() -> Iterator[None]:
    yield
    MECHANISMS.unregister("last-words")


def test_every_block_does_what_the_page_says(tmp_path: Path, unregistered: None) -> None:
    (tmp_path / "page.md").write_text(SECTION, encoding="utf-8")
    names, shown = run_page(tmp_path / "page.md")
    assert shown == 1
    assert {"LastWords", "Phonebook", "TestLastWords"} <= names.keys()


class TestLastWords(TextMechanismConformance):
    implementation = classes()["LastWords"]


class TestPhonebook(TextMechanismConformance):
    implementation = classes()["Phonebook"]

    def text(self, seed: int) -> str:
        return f"{super().text(seed).split()[0]} has the number {seed}."
