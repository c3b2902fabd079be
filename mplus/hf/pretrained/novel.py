"""The novel that comes with the package, chapter by chapter."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

from attrs import define

TITLE = "The Secret Garden"
AUTHOR = "Frances Hodgson Burnett, 1911"
FILE = Path(__file__).parents[2] / "data" / "novels" / "Burnett_Garden_1911.txt.gz"

_HEADING = re.compile(r"^CHAPTER [IVXLC]+\n+(.+)\n", re.MULTILINE)


@define(frozen=True)
class Chapter:
    """One chapter.

    Attributes:
        name: number and title, for example ``chapter 7: THE KEY TO THE GARDEN``.
        text: all of it, heading included.
    """

    name: str
    text: str


def chapters(file: Path = FILE) -> list[Chapter]:
    """Return the chapters in order; together they are the novel without its title page."""
    with gzip.open(file, "rt", encoding="utf-8") as opened:
        text = opened.read()
    headings = list(_HEADING.finditer(text))
    ends = [heading.start() for heading in headings[1:]] + [len(text)]
    return [
        Chapter(f"chapter {number}: {heading[1].strip()}", text[heading.start() : end])
        for number, (heading, end) in enumerate(zip(headings, ends, strict=True), 1)
    ]
