"""Reports: on a source, a write, a forgetting, and a memory in one line; and a progress bar for long writes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime

from attrs import define

from mplus.memory.state import LONG_TERM
from mplus.memory.transaction import Streams

LONG = 16
"""Chunks from which a bar is shown in a terminal when nobody asked."""


@define(frozen=True)
class SourceInfo:
    """One source of a stream, as ``Memory.sources`` lists it.

    Attributes:
        name: the name given to ``write``, or None.
        tokens, chunks: how much text was written under that name; what waits for more counts as tokens, too.
        held: rows still held, averaged over the layers: of each list of the mechanism ("short-term" and "pending" of
            M+) and of the store ("long-term").
        newest_age, oldest_age: of the rows still held in any layer, in rows written since (0: nothing was written after
            the row); None where none is held.
        newest_age_chunks, oldest_age_chunks: the same in chunks of ``memory_tokens_per_chunk`` rows, rounded down.
        written, last_written: when its first and its last chunk were written, in UTC; None: by an mplus that did not
            note it.
        expires: when it is to be forgotten; None: it is not.
        pinned: whether its rows are kept from eviction.
        tail_tokens: tokens of it that wait for more, to make up a chunk; a read sees them as they are.
    """

    name: str | None
    tokens: int
    chunks: int
    held: dict[str, float]
    newest_age: int | None
    oldest_age: int | None
    newest_age_chunks: int | None
    oldest_age_chunks: int | None
    written: datetime | None = None
    last_written: datetime | None = None
    expires: datetime | None = None
    pinned: bool = False
    tail_tokens: int = 0


@define(frozen=True)
class ForgetReport:
    """Rows and texts that one ``forget`` removed, summed over the batch rows it looked at.

    Attributes:
        source: the name that was forgotten.
        tokens, chunks: how much text had been written under it.
        held: rows of it that were still held, in each layer, named as in ``SourceInfo.held``.
        rebuilt: chunks that were written again; None where nothing was (``mode="drop"``).
    """

    source: str | None
    tokens: int
    chunks: int
    held: dict[str, tuple[int, ...]]
    rebuilt: int | None = None

    @property
    def rows(self) -> int:
        """Rows in all layers together."""
        return sum(map(sum, self.held.values()))


@define(frozen=True)
class WriteReport:
    """Counts of one ``write``. Lists have one entry per batch row.

    Attributes:
        tokens: text tokens taken in.
        chunks: chunks written.
        dropped_rows: rows per layer that left the STM.
        evicted_rows: rows per layer that left the LTM.
        seconds: wall-clock time of the whole call.
        tail_tokens: tokens of the source that wait for more, to make up a chunk; in the report of a write that was made
            before (``write_id``), those that wait now.
    """

    tokens: list[int]
    chunks: list[int]
    dropped_rows: list[int]
    evicted_rows: list[int]
    seconds: float
    tail_tokens: list[int]

    @staticmethod
    def nothing(streams: int) -> WriteReport:
        """Return the report of a write to ``streams`` streams that has not begun."""
        return WriteReport([0] * streams, [0] * streams, [0] * streams, [0] * streams, 0.0, [0] * streams)

    def count(self, row: int, tokens: int, dropped: int, evicted: int) -> None:
        """Count one more chunk of a batch row, once it is written."""
        self.tokens[row] += tokens
        self.chunks[row] += 1
        self.dropped_rows[row] += dropped
        self.evicted_rows[row] += evicted

    @property
    def tokens_per_second(self) -> float:
        """Text tokens of all batch rows written per second."""
        return sum(self.tokens) / self.seconds if self.seconds else float("inf")


@define(frozen=True, kw_only=True)
class MergeReport:
    """The content of another memory that one ``Memory.merge`` took in. Lists have one entry per batch row.

    Attributes:
        sources: the names of the other memory's sources, and which they have in this one.
        tokens, chunks: text that had been written under them.
        dropped_rows: rows per layer that left the STM, and those of the other memory that did not get into it.
        evicted_rows: rows per layer that left the LTM.
        unnoted_writes: ids of writes (``write_id``) to the other memory that this one had given to writes of its own,
            which it goes by.
        seconds: wall-clock time of the whole call.
    """

    sources: list[dict[str | None, str | None]]
    tokens: list[int]
    chunks: list[int]
    dropped_rows: list[int]
    evicted_rows: list[int]
    unnoted_writes: list[list[str]]
    seconds: float


def describe(streams: Streams) -> str:
    """Return size, limits and bytes of a memory in a line, for ``repr``."""
    rows = []
    for state, store in zip(streams.states[:4], streams.stores[:4], strict=True):
        counts = {state.lists.get(name, name): parts[0] for name, parts in state.counts().items() if parts}
        counts[LONG_TERM] = store.count(0)
        rows.append(f"[{', '.join(f'{count} {name}' for name, count in counts.items())}]")
    more = ", ..." if len(streams) > 4 else ""
    limit, capacity = "", streams.budget.capacity
    if capacity is not None:
        limit = f", at most {capacity} LTM ({streams.budget.text_tokens(streams.engine.mechanism)} text tokens)"
    waiting = sum(state.tail_tokens for state in streams.states)
    tail = f", {waiting} text tokens waiting" if waiting else ""
    size = f"{streams.nbytes / 2**20:.1f} MiB"
    return f"batch_size={len(streams)}, rows per layer: {', '.join(rows)}{more}{tail}{limit}, {size}"


@contextmanager
def progress_bar(
    title: str, total: int | None, wanted: bool | None, steps: int, unit: str = "tokens"
) -> Iterator[Callable[[int], None]]:
    """Yield ``advance(units)``; ``total`` None: unknown. ``wanted`` None: for ``LONG`` steps, on a terminal."""
    if wanted is None:
        wanted = steps >= LONG and sys.stderr.isatty()
    if not wanted:
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.advance(task, done)
