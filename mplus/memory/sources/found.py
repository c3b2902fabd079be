"""FoundText: a thing that a search of a memory found."""

from __future__ import annotations

from datetime import datetime

from attrs import define

from mplus.memory.sources.clock import datetime_of
from mplus.memory.state import StreamState


@define(frozen=True)
class FoundText:
    """A chunk, or an entry, that a text brings back from a memory.

    Attributes:
        score: of the retriever; higher is better.
        source: the name given to ``write``, or None.
        written: when its source was last written, in UTC; None: it is not known.
        text: its words; None: they are not kept.
    """

    score: float
    source: str | None
    written: datetime | None
    text: str | None

    @staticmethod
    def of(state: StreamState, number: int, score: float, text: str | None) -> FoundText:
        """Return what was found of the source with this number in a stream."""
        source = state.sources[number]
        return FoundText(score, source.name, datetime_of(source.last_time), text)
