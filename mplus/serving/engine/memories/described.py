"""The objects that the HTTP contract describes writes, sources and memories by, as plain data."""

from __future__ import annotations

from datetime import datetime

from attrs import asdict, define

from mplus.config import JsonValue, MPlusConfig
from mplus.memory.memory import Memory
from mplus.memory.report import SourceInfo, WriteReport
from mplus.serving.engine.answers.sources import text_age


@define(frozen=True)
class WriteCounts:
    """Counts of a write.

    Attributes:
        tokens, chunks: that were written.
        pending: tokens of the source that wait for more, to make up a chunk; reads see them.
        dropped_rows, evicted_rows: rows per layer that left the short-term memory, and the memory.
    """

    tokens: int
    chunks: int
    pending: int
    dropped_rows: int
    evicted_rows: int

    @staticmethod
    def of(report: WriteReport) -> dict[str, JsonValue]:
        """Return the counts of a report on a memory of one stream."""
        counts = (report.tokens, report.chunks, report.tail_tokens, report.dropped_rows, report.evicted_rows)
        return asdict(WriteCounts(*map(sum, counts)))


@define(frozen=True)
class SourceFacts:
    """A source of a memory; ages are text tokens written since, times are ISO 8601 in UTC.

    Attributes:
        name: that it was written under; None: it had none.
        tokens, chunks: that were written; ``chunks`` are stored ones.
        pending: tokens that wait for more of it.
        newest_age, oldest_age: of what is held; None: nothing is.
        time, last_time: when it was first and last written; None: not known.
        expires: when it is forgotten; None: not by itself.
        pinned: whether it is kept from eviction.
        rows: that are held, averaged over the layers, by where.
    """

    name: str | None
    tokens: int
    chunks: int
    pending: int
    newest_age: int | None
    oldest_age: int | None
    time: str | None
    last_time: str | None
    expires: str | None
    pinned: bool
    rows: dict[str, float]

    @staticmethod
    def of(one: SourceInfo, config: MPlusConfig) -> dict[str, JsonValue]:
        """Return the facts of a source in a memory of this configuration."""
        ages = [None if age is None else text_age(age, config) for age in (one.newest_age, one.oldest_age)]
        times = [None if time is None else to_iso(time) for time in (one.written, one.last_written, one.expires)]
        facts = (one.name, one.tokens, one.chunks, one.tail_tokens, *ages, *times, one.pinned, dict(one.held))
        return asdict(SourceFacts(*facts))  # type: ignore[arg-type]


@define(frozen=True)
class MemorySizes:
    """Sizes of a memory.

    Attributes:
        sources: number of them.
        tokens: that were written.
        pending: tokens that wait for more of their source.
        bytes: of all rows.
        text_capacity: text tokens that there is room for; None: no limit.
    """

    sources: int
    tokens: int
    pending: int
    bytes: int
    text_capacity: int | None

    @staticmethod
    def of(memory: Memory) -> dict[str, JsonValue]:
        """Return the sizes of a memory."""
        sources = memory.sources()
        tokens, tails = sum(one.tokens for one in sources), sum(one.tail_tokens for one in sources)
        return asdict(MemorySizes(len(sources), tokens, tails, memory.nbytes, memory.text_capacity))


def to_iso(time: datetime) -> str:
    """Return a time as clients see it."""
    return time.isoformat(timespec="seconds")
