"""The page about evaluation: its blocks of Python are run in order, and print what it says."""

from __future__ import annotations

from tests.helpers.pages import DOCS, run_page

PAGE = DOCS / "evaluation.md"


def test_every_block_does_what_the_page_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, shown = run_page(PAGE)
    assert shown == 4
    assert {path.name for path in tmp_path.iterdir()} == {"pairs.jsonl", "report.json", "report.png", "report.svg"}
