"""Reply: an answer, what memory brought back for it, and how long it took."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from itertools import groupby
from typing import TYPE_CHECKING

from attrs import define

if TYPE_CHECKING:
    from mplus.hf.reading.reading import RetrievedSource


@define(frozen=True, kw_only=True)
class Recalled:
    """A piece of memory that was read for an answer.

    Attributes:
        source: name of the source that it was written from; None: it had none.
        written: when that was last written, in UTC; None: not known.
        score: of the choice, where there was one.
        rows: rows of it that were read: tokens with "kv", passages of a memory of text.
    """

    source: str | None
    written: datetime | None = None
    score: float | None = None
    rows: int = 1


@define(frozen=True, kw_only=True)
class Reply:
    """An answer.

    Attributes:
        text: what was said.
        recalled: what memory brought back for it, in the order in which it was read; () without memory.
        prompt_tokens: tokens of the prompt, without what was recalled.
        tokens: generated ones.
        first_seconds: from the call to the first token; None: none came.
        seconds: of the whole answer.
        interrupted: it was ended from outside, so there may be more to say.
    """

    text: str
    recalled: tuple[Recalled, ...] = ()
    prompt_tokens: int = 0
    tokens: int = 0
    first_seconds: float | None = None
    seconds: float = 0.0
    interrupted: bool = False


def recalled_of(layers: Sequence[Sequence[RetrievedSource]]) -> tuple[Recalled, ...]:
    """Return the pieces of memory that were read for one prompt.

    Args:
        layers: of ``generate(output_sources=True)``, what each layer read. What differs between the layers is given
            for the first of them that read anything.
    """
    found = next((layer for layer in layers if layer), ())
    # A chunk is a piece of its own; rows one by one belong together where they are of one source.
    pieces = groupby(
        enumerate(found), key=lambda row: (row[0] if row[1].tokens > 1 else -1, row[1].source, row[1].score)
    )
    recalled = []
    for _, some in pieces:
        rows = [row for _, row in some]
        tokens = sum(row.tokens for row in rows)
        recalled.append(Recalled(source=rows[0].source, written=rows[0].written, score=rows[0].score, rows=tokens))
    return tuple(recalled)
