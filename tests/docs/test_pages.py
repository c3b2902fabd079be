"""What the pages say of the tree and of each other is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def test_where_to_change_something_exists() -> None:
    section = (DOCS / "contributing.md").read_text(encoding="utf-8").partition("\n## Where do I change")[2]
    paths = re.findall(r"`((?:mplus|tests|benchmarks)/[\w./]*)`", section.partition("\n## ")[0])
    assert len(paths) > 40
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_the_glossary_is_sorted_and_says_each_word_once_with_a_link() -> None:
    lines = re.findall(r"^\| \*\*.*", (DOCS / "glossary.md").read_text(encoding="utf-8"), re.MULTILINE)
    terms = [line.split("**")[1] for line in lines]
    assert not [line for line in lines if "](" not in line]
    assert len(terms) > 50
    assert terms == sorted(set(terms), key=str.lower)


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: page.relative_to(DOCS).as_posix())
def test_every_page_is_in_the_navigation(page: Path) -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2].partition("\n\n")[0]
    assert re.search(rf"[ ]{re.escape(page.relative_to(DOCS).as_posix())}$", navigation, re.MULTILINE)
