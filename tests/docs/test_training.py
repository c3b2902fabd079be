"""The tutorial about training: its recipe and its blocks of Python are run in order, and print what it says."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

from mplus.training.objectives import OBJECTIVES
from mplus.training.recipe.files import shipped_recipes
from tests.docs.test_quickstart import BLOCK, expect

PAGE = Path(__file__).parents[2] / "docs" / "training.md"


def test_every_block_does_what_the_page_says(tmp_path, monkeypatch):
    page = PAGE.read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "training"}
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
    assert shown == 4
    assert {path.name for path in tmp_path.iterdir()} == {"book", "garden.toml", "garden-run"}
    assert (tmp_path / "garden-run" / "recipe.toml").read_text() == (tmp_path / "garden.toml").read_text()


def rows(heading: str) -> set[str]:
    """First cells of the table under a heading."""
    section = PAGE.read_text(encoding="utf-8").split(f"# {heading}\n", 1)[1].split("\n#", 1)[0]
    cells = re.findall(r"^\| (`[^|]*`) \|", section, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`([\w-]+)`", cell)}


def test_the_tables_have_every_objective_and_recipe():
    assert rows("Stages") == set(OBJECTIVES.names()) - {"revisit"}, "revisit is a table of its own"
    assert rows("Recipes that come with mplus") == set(shipped_recipes())
