"""The tutorial about training: its recipe and its blocks of Python are run in order, and print what it says."""

from __future__ import annotations

import re

from mplus.training.objectives import OBJECTIVES
from tests.helpers.pages import DOCS, run_page
from tests.training.recipes import SHIPPED

PAGE = DOCS / "training.md"


def test_every_block_does_what_the_page_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, shown = run_page(PAGE)
    assert shown == 5
    assert {path.name for path in tmp_path.iterdir()} == {"book", "garden.toml", "garden-run"}
    assert (tmp_path / "garden-run" / "recipe.toml").read_text() == (tmp_path / "garden.toml").read_text()


def rows(heading: str) -> set[str]:
    """First cells of the table under a heading."""
    section = PAGE.read_text(encoding="utf-8").split(f"# {heading}\n", 1)[1].split("\n#", 1)[0]
    cells = re.findall(r"^\| (`[^|]*`) \|", section, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`([\w-]+)`", cell)}


def test_the_tables_have_every_objective_and_recipe():
    assert rows("Stages") == set(OBJECTIVES.names()) - {"revisit"}, "revisit is a table of its own"
    assert rows("Recipes that come with mplus") == set(SHIPPED)
