"""Generic English statements, and a question about each: what chunk retrievers learn a decoder by."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files

from attrs import define


@define(frozen=True)
class Statement:
    """A ``passage`` of one or two sentences, and a ``question`` that it answers."""

    passage: str
    question: str


def statements() -> Sequence[Statement]:
    """Return the statements that come with mplus, some 2,000 tokens with their questions, written for it.

    Example:
        >>> from mplus.retrievers.chunks.statements import statements
        >>> statements()[1].question
        'Where does Daniela keep her spare key?'
    """
    text = files("mplus.retrievers.chunks").joinpath("statements.txt").read_text(encoding="utf-8")
    return [Statement(*block.splitlines()) for block in text.strip().split("\n\n")]
