"""The page about comparing memories: its recipe and its blocks of Python are run in order, and print what it says."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

from mplus.evaluation.reports.report import Report
from tests.docs.test_quickstart import BLOCK, expect

PAGE = Path(__file__).parents[2] / "docs" / "compare.md"


def test_every_block_does_what_the_page_says(tmp_path, monkeypatch):
    page = PAGE.read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "compare"}
    printed, shown = io.StringIO(), 0
    for block in BLOCK.finditer(page):
        if block["title"]:
            Path(block["title"]).write_text(block["text"], encoding="utf-8")
        elif block["language"] == "python":
            printed = io.StringIO()
            code = compile("\n" * page[: block.start("text")].count("\n") + block["text"], str(PAGE), "exec")
            with contextlib.redirect_stdout(printed):
                exec(code, names)
        else:
            expect(block["text"], printed.getvalue())
            shown += 1
    assert shown == 3
    assert {path.name for path in tmp_path.iterdir()} == {"facts.toml", "together.json", "together.svg"}
    assert Report.load(tmp_path / "together.json") == names["together"]
