"""The quickstart, done as it says: every block of Python run in order, output compared."""

from __future__ import annotations

from tests.helpers.pages import DOCS, run_page

PAGE = DOCS / "quickstart.md"


def test_every_block_does_what_the_page_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, shown = run_page(PAGE)
    assert shown >= 8
    assert {path.name for path in tmp_path.iterdir()} == {
        "garden",
        "garden-model",
        "garden-adapter",
        "garden-both",
        "memory.toml",
        "memory.json",
    }
