"""Write texts to one memory or to many, and a chunk to every stream of one."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Literal, overload

from attrs import evolve
from torch import Tensor

from mplus.errors import InputError, MemoryMismatchError, NotSupported, WriteTogetherError
from mplus.memory.report import WriteReport, progress_bar
from mplus.memory.sources.expiry import facts_of
from mplus.memory.sources.source import SourceMarks
from mplus.memory.transaction import Streams
from mplus.memory.weights_state import WeightsState
from mplus.memory.writing.at_once import write_all_at_once
from mplus.memory.writing.chunking import SourceNames, WriteData, check_chunk, check_vocabulary, to_names
from mplus.memory.writing.once import report_of, resumed
from mplus.memory.writing.passes import write_all, write_streams
from mplus.memory.writing.plan import NOTHING, StreamWrite, planned, prepare_write
from mplus.tokenizer import Tokenizer

if TYPE_CHECKING:
    from mplus.memory.memory import Memory


def write(
    memory: Memory,
    data: WriteData,
    source: SourceNames,
    expires: datetime | timedelta | None,
    progress: bool | None,
) -> WriteReport:
    """Write to one memory; see ``Memory.write``."""
    facts = facts_of(memory.streams, expires)
    (report,), errors = _write([memory], [data], [source], progress, facts)
    for error in errors.values():
        raise error
    return report


@overload
def write_together(
    memories: Sequence[Memory],
    data: Sequence[WriteData],
    sources: Sequence[SourceNames] | None = None,
    *,
    write_ids: Sequence[str | None] | None = None,
    atomic: bool = False,
    errors: Literal["raise"] = "raise",
    progress: bool | None = None,
) -> list[WriteReport]: ...


@overload
def write_together(
    memories: Sequence[Memory],
    data: Sequence[WriteData],
    sources: Sequence[SourceNames] | None = None,
    *,
    write_ids: Sequence[str | None] | None = None,
    atomic: bool = False,
    errors: Literal["return"],
    progress: bool | None = None,
) -> list[WriteReport | Exception]: ...


def write_together(
    memories: Sequence[Memory],
    data: Sequence[WriteData],
    sources: Sequence[SourceNames] | None = None,
    *,
    write_ids: Sequence[str | None] | None = None,
    atomic: bool = False,
    errors: Literal["raise", "return"] = "raise",
    progress: bool | None = None,
) -> Sequence[WriteReport | Exception]:
    """Write to several memories of one decoder at once: one user's text to each, say.

    Chunks of equal length, to streams with equally many short-term rows, share a pass. Each memory gets what
    ``memory.write`` would have given it. One that cannot be written to does not keep the others from it.

    Args:
        memories: different ones.
        data: for each memory, as for ``Memory.write``.
        sources: for each memory, as there; None: no names.
        write_ids: for each memory, as ``write_id`` there; None: no ids.
        atomic: as there, for each memory by itself: one that fails keeps nothing of it, the others have all of theirs.
        errors: "raise": raise one error when all others have been written. "return": raise none, and return what
            failed in its place, as ``asyncio.gather(..., return_exceptions=True)`` does.
        progress: show a progress bar; None: for long writes in a terminal.

    Returns:
        For each memory what was written; ``seconds`` are those of the whole call. With an id, as ``Memory.write``.

    Raises:
        WriteTogetherError: some memories failed, each for what ``Memory.write`` would have raised, because it came
            before in the list already (InputError), or because it belongs to another decoder than the first one
            (MemoryMismatchError). Its ``errors`` and ``reports`` tell which ones, and what was written.
        InputError: the lists differ in length, or ``errors`` is something else; nothing was written.

    An interrupt ends the call at once; every memory has the chunks written before it, of an ``atomic`` call none.
    """
    if errors not in ("raise", "return"):
        raise InputError(f"errors must be 'raise' or 'return', got {errors!r}")
    sources = [None] * len(memories) if sources is None else sources
    write_ids = [None] * len(memories) if write_ids is None else write_ids
    if isinstance(write_ids, str) or len(write_ids) != len(memories):
        raise InputError(f"write_ids must be one id or None for each of {len(memories)} memories, got {write_ids!r}")
    if isinstance(data, str) or not memories or not len(memories) == len(data) == len(sources):
        raise InputError(
            f"there must be one text, and one source if any, for each memory: got {len(memories)} memories, "
            f"{'one text' if isinstance(data, str) else f'{len(data)} texts'} and {len(sources)} sources"
        )
    reports, failed = _write(memories, data, sources, progress, write_ids=write_ids, atomic=atomic)
    if failed and errors == "raise":
        raise WriteTogetherError.of(reports, failed)
    return [failed.get(position, report) for position, report in enumerate(reports)]


def _write(
    memories: Sequence[Memory],
    data: Sequence[WriteData],
    sources: Sequence[SourceNames],
    progress: bool | None,
    facts: SourceMarks = NOTHING,
    *,
    write_ids: Sequence[str | None] = (),
    atomic: bool = False,
) -> tuple[list[WriteReport], dict[int, Exception]]:
    """Return what was written to each memory, and what failed, by position of the memory in the list."""
    begun = time.perf_counter()
    reports, errors = [WriteReport.nothing(getattr(memory, "batch_size", 0)) for memory in memories], {}
    writes: list[StreamWrite] = []
    positions: dict[int, int] = {}
    now: WeightsState | None = None
    for position, memory in enumerate(memories):
        try:
            _check_one(memories, position, positions)
            now = memory.engine.weights() if now is None else now  # once: it looks at every layer
            writes += planned(memory, data[position], sources[position], reports[position], facts, now)
            positions[id(memory.streams)] = position
        except Exception as error:  # noqa: BLE001 - handed to the caller, once the others have been written
            errors[position] = error
    with ExitStack() as held:
        for _, position in sorted(positions.items()):  # in one order everywhere: two calls cannot wait for each other
            held.enter_context(memories[position].streams.write_lock)
        of_ids = {position: name for position, name in enumerate(write_ids) if name is not None}
        known = [(write, of_ids.get(positions[id(write.streams)])) for write in writes]
        writes, refused = _resumed(known, begun)
        cut = [write.cut() for write in writes]
        total = sum(len(ids) for write in cut for ids in write.chunks)
        turns = max((len(write.chunks) for write in cut), default=0)
        with progress_bar("writing", total, progress, steps=turns) as advance:
            failed = refused | (write_all_at_once(writes, advance) if atomic else write_all(cut, advance))
        errors |= {positions[key]: error for key, error in failed.items()}
        seconds = time.perf_counter() - begun
        reports = [evolve(report, seconds=seconds) for report in reports]
        for position, report in enumerate(reports):
            if position in errors and (atomic or any(positions[key] == position for key in refused)):
                reports[position] = evolve(WriteReport.nothing(len(report.tokens)), seconds=seconds)
            elif position in of_ids and position in positions.values():
                rows = [write.row for write, _ in known if positions[id(write.streams)] == position and write.tokens]
                reports[position] = report_of(memories[position].streams.states, of_ids[position], rows)
    return reports, dict(sorted(errors.items()))


def _resumed(
    writes: Sequence[tuple[StreamWrite, str | None]], begun: float
) -> tuple[list[StreamWrite], dict[int, Exception]]:
    """Return what is left to do of writes, some with an id, and by id of its ``Streams`` each memory that is refused.

    Args:
        writes: all of each, and its id.
        begun: when this call began, by ``time.perf_counter``.
    """
    left, refused = list[StreamWrite](), dict[int, Exception]()
    for write, write_id in writes:
        try:
            left.append(write if write_id is None else resumed(write, write_id, begun))
        except InputError as error:
            refused[id(write.streams)] = error
    return [write for write in left if id(write.streams) not in refused], refused


def _check_one(memories: Sequence[Memory], position: int, written: Mapping[int, int]) -> None:
    """Refuse what is no memory, comes a second time, or belongs to another decoder than the first one."""
    memory, first = memories[position], memories[0]
    if not isinstance(getattr(memory, "streams", None), Streams):  # what only a Memory has; this room is below it
        raise InputError(f"memories must be instances of mplus.Memory, got {type(memory).__name__}")
    if id(memory.streams) in written:
        raise InputError(
            f"memories must be different ones, and this one comes at place {written[id(memory.streams)]} already: "
            "write its texts one after the other"
        )
    if memory.engine is not getattr(first, "engine", memory.engine):
        raise MemoryMismatchError("memories that are written together must belong to one decoder, that of the first")


def write_chunk(streams: Streams, ids: Tensor, source: SourceNames, tokenizer: Tokenizer | None = None) -> WriteReport:
    """Write one chunk to every stream; see ``Memory.write_chunk``."""
    begun = time.perf_counter()
    config, count = streams.engine.config, len(streams)
    if streams.engine.writes_text:
        raise NotSupported("write_chunk is for one pass of the decoder, and a memory of text runs none: use write")
    check_chunk(ids, count, config.min_chunk_tokens, config.chunk_tokens)
    check_vocabulary(ids, streams.engine.vocab_size)
    names = to_names(source, count)
    prepare_write(streams, range(count))
    report = WriteReport.nothing(count)
    with streams.write_lock:
        write_streams([StreamWrite(streams, row, [ids[row]], names[row], report, tokenizer) for row in range(count)])
    return evolve(report, seconds=time.perf_counter() - begun)
