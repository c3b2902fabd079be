"""Writes, a chunk at a time: those of different memories share a pass, and a novel does not hold up a line."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta

from attrs import define, evolve

from mplus.config import JsonValue
from mplus.errors import InputError, NotSupported
from mplus.memory.memory import Memory
from mplus.memory.report import WriteReport
from mplus.memory.sources.clock import expiry_of
from mplus.memory.sources.expiry import check_room
from mplus.memory.sources.source import SourceMarks
from mplus.memory.weights_state import WeightsState
from mplus.memory.writing.free import check_free, grown_bytes
from mplus.memory.writing.once import report_of, resumed
from mplus.memory.writing.passes import write_all
from mplus.memory.writing.plan import StreamWrite, planned
from mplus.serving.engine.memories.described import WriteCounts
from mplus.serving.messages import WriteMemory


@define(eq=False)
class MemoryWrite:
    """A text that is being written to a memory.

    Attributes:
        memory: where to.
        left: the chunks that are to be written yet, and what waits behind them; None: nothing is.
        report: of this call.
        write_id: what the client called the write.
        begun: when it began, by ``time.perf_counter``.
    """

    memory: Memory
    left: StreamWrite | None
    report: WriteReport
    write_id: str | None
    begun: float

    @staticmethod
    def of(memory: Memory, asked: WriteMemory, now: WeightsState) -> MemoryWrite:
        """Tokenise a text and cut it into chunks. Raises as ``Memory.write``; nothing is written yet.

        ``now``: what the decoder computes with.
        """
        begun, streams = time.perf_counter(), memory.streams
        report, name = WriteReport.nothing(len(streams)), asked.source
        facts = _facts(memory, asked)
        with streams.write_lock:
            data = asked.data if isinstance(asked.data, str) else [dict(message) for message in asked.data]
            (write,) = planned(memory, data, name, report, facts, now)
            if not write.tokens:
                raise InputError("there must be text to write, got none")
            if asked.write_id is not None:
                write = resumed(write, asked.write_id, begun)
            left = write.cut() if write.tokens else None
            if left is not None and left.chunks and not streams.engine.writes_text:
                check_room(streams, [left.row])
                check_free(streams, [left])
        return MemoryWrite(memory, left, report, asked.write_id, begun)

    @property
    def chunks(self) -> int:
        """Return how many passes are left: one for each chunk, and one for a text that only waits."""
        return 0 if self.left is None else max(len(self.left.chunks), 1)

    @property
    def bytes(self) -> int:
        """Return about how many bytes of disk the rest takes."""
        left = self.left
        if left is None or left.streams.engine.writes_text:
            return 0 if left is None else sum(len(passage.encode()) for passage in left.passages)
        return grown_bytes(left)

    def next(self) -> StreamWrite:
        """Return the write of the next chunk; with the last one goes what has to wait."""
        left = self._need_left()
        rest = left.rest
        if rest is not None and len(left.chunks) > 1:
            # Chunks begin with what waited. Until the last one, what does is what this one leaves of it.
            rest = left.streams.states[left.row].waiting(left.name)[len(left.chunks[0]) :]
        return evolve(left, chunks=left.chunks[:1], passages=left.passages[:1], rest=rest)

    def advance(self) -> None:
        """Note that the next chunk is written."""
        left = self._need_left()
        before = left.passages[0] if left.passages else left.before
        rest = evolve(left, chunks=left.chunks[1:], passages=left.passages[1:], before=before)
        self.left = rest if rest.chunks else None

    def _need_left(self) -> StreamWrite:
        if self.left is None:
            raise RuntimeError("all of this text was written: look at chunks first")
        return self.left

    def done(self) -> dict[str, JsonValue]:
        """Return the answer to the command, once all is written."""
        report = self.report
        if self.write_id is not None:
            report = report_of(self.memory.states, self.write_id, [0])
        return {**WriteCounts.of(report), "seconds": round(time.perf_counter() - self.begun, 4)}


def write_next(writes: Sequence[MemoryWrite]) -> Mapping[int, Exception]:
    """Write the next chunk of each of some memories together.

    Args:
        writes: to different memories.

    Returns:
        What failed, by place in ``writes``; the others have their chunk, on disk.
    """
    with _locked(writes):
        failed = write_all([write.next() for write in writes], lambda tokens: None)
    errors = {}
    for place, write in enumerate(writes):
        error = failed.get(id(write.memory.streams))
        if error is None:
            write.advance()
        else:
            errors[place] = error
    return errors


@contextmanager
def _locked(writes: Sequence[MemoryWrite]) -> Iterator[None]:
    with ExitStack() as held:
        for write in writes:
            held.enter_context(write.memory.streams.write_lock)
        yield


def _facts(memory: Memory, asked: WriteMemory) -> SourceMarks:
    facts: SourceMarks = {}
    if asked.expires is not None:
        facts["expires"] = expiry_of(_moment(asked.expires), memory.streams.clock)
    if asked.pin:
        mechanism = memory.engine.mechanism
        if not mechanism.keeps_pinned:
            raise NotSupported(f"pin does not go with memories of the mechanism {mechanism.name!r}: leave it out")
        facts["pinned"] = True
    return facts


def _moment(expires: float | str) -> datetime | timedelta:
    if not isinstance(expires, str):
        return timedelta(seconds=expires)
    try:
        moment = datetime.fromisoformat(expires)
    except ValueError as error:
        raise InputError(f"expires must be seconds or an ISO 8601 time with a timezone, got {expires!r:.80}") from error
    if moment.tzinfo is None:
        raise InputError(f"expires must have a timezone, got {expires!r:.80}")
    try:
        return moment.astimezone(UTC)
    except OverflowError as error:
        raise InputError(f"expires must be a time of the years 1 to 9999 in UTC, got {expires!r:.80}") from error
