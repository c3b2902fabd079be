"""The page about comparing memories: its recipe and its blocks of Python are run in order, and print what it says."""

from __future__ import annotations

import pytest

from mplus.evaluation.reports.report import Report
from tests.helpers.pages import DOCS, run_page

PAGE = DOCS / "compare.md"


@pytest.mark.nightly  # its commands are those of the page about evaluation, at a larger size
def test_every_block_does_what_the_page_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, shown = run_page(PAGE)
    assert shown == 3
    assert {path.name for path in tmp_path.iterdir()} == {"facts.toml", "together.json", "together.svg"}
    assert Report.load(tmp_path / "together.json") == names["together"]
