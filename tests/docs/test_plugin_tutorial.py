"""The tutorials that build a package of a plug-in: a retriever, and a mechanism with its recipe."""

from __future__ import annotations

import ast
import sys
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

from mplus.mechanisms import MECHANISMS
from tests.helpers.pages import BLOCK, run_page
from tests.helpers.tutorial import ROOT, follow, make_environment

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.nightly  # a new environment; the mechanism below makes one for every change
def test_every_block_about_a_retriever_does_what_the_page_says(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    assert {block["language"] for block in BLOCK.finditer(page)} == {"python", "toml", "bash", "text"}
    assert follow(page, tmp_path / "work", make_environment(tmp_path / "venv")) >= 5


def package_section() -> str:
    """Return the part of the page about mechanisms that a newcomer types in."""
    page = (ROOT / "docs" / "write-a-mechanism.md").read_text(encoding="utf-8")
    return page.partition("\n## A package from nothing\n")[2].partition("\n## ")[0]


def test_a_mechanism_written_by_the_page_conforms_trains_and_is_measured(tmp_path: Path) -> None:
    assert follow(package_section(), tmp_path / "work", make_environment(tmp_path / "venv")) == 4


def test_the_mechanism_of_the_page_is_short_and_that_of_the_example() -> None:
    blocks = {block["title"]: block["text"] for block in BLOCK.finditer(package_section())}
    page = blocks["mplus-tokens/src/mplus_tokens/__init__.py"]
    assert len(page.splitlines()) <= 40
    example = (ROOT / "examples" / "write_a_mechanism.py").read_text(encoding="utf-8")
    classes = [
        [ast.dump(node) for node in ast.parse(text).body if isinstance(node, ast.ClassDef)] for text in (page, example)
    ]
    assert len(classes[0]) == 1
    assert classes[0] == classes[1]


def test_the_mechanism_with_parameters_does_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    titled = {block["title"]: block["text"] for block in BLOCK.finditer(package_section())}
    tokens = ModuleType("mplus_tokens")
    tokens.__file__ = str(tmp_path / "__init__.py")
    exec(titled["mplus-tokens/src/mplus_tokens/__init__.py"], vars(tokens))
    monkeypatch.setitem(sys.modules, "mplus_tokens", tokens)
    page = (ROOT / "docs" / "write-a-mechanism.md").read_text(encoding="utf-8")
    (tmp_path / "page.md").write_text(page.partition("\n## Parameters\n")[2].partition("\n## ")[0], encoding="utf-8")
    try:
        names, shown = run_page(tmp_path / "page.md")
        assert shown == 1
        config = names["model"].mplus_config
        assert (config.chunk_tokens, config.short_term_tokens) == (128, None)
    finally:
        MECHANISMS.unregister("gated")
