"""Write texts to streams, of one memory or of many, a chunk of each at a time in shared passes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from attrs import evolve
from torch import Tensor

from mplus.errors import (
    InputError,
    MechanismError,
    MemoryFullError,
    MemoryMismatchError,
    NotSupported,
    WriteTogetherError,
)
from mplus.memory.report import WriteReport, progress_bar
from mplus.memory.sources.clock import read_clock
from mplus.memory.sources.expiry import check_room, facts_of
from mplus.memory.state import StreamState, alike
from mplus.memory.transaction import Streams
from mplus.memory.writing.chunking import SourceNames, Tokenizer, WriteData, check_chunk, check_vocabulary, to_names
from mplus.memory.writing.plan import NOTHING, StreamWrite, planned, prepare_write
from mplus.memory.writing.update import NewEntries, Update, WriteContext, check_absorbed, check_finite

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
    errors: Literal["raise"] = "raise",
    progress: bool | None = None,
) -> list[WriteReport]: ...


@overload
def write_together(
    memories: Sequence[Memory],
    data: Sequence[WriteData],
    sources: Sequence[SourceNames] | None = None,
    *,
    errors: Literal["return"],
    progress: bool | None = None,
) -> list[WriteReport | Exception]: ...


def write_together(
    memories: Sequence[Memory],
    data: Sequence[WriteData],
    sources: Sequence[SourceNames] | None = None,
    *,
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
        errors: "raise": raise one error when all others have been written. "return": raise none, and return what
            failed in its place, as ``asyncio.gather(..., return_exceptions=True)`` does.
        progress: show a progress bar; None: for long writes in a terminal.

    Returns:
        For each memory what was written; ``seconds`` are those of the whole call.

    Raises:
        WriteTogetherError: some memories failed, each for what ``Memory.write`` would have raised, because it came
            before in the list already (InputError), or because it belongs to another decoder than the first one
            (MemoryMismatchError). Its ``errors`` and ``reports`` tell which ones, and what was written.
        InputError: the lists differ in length, or ``errors`` is something else; nothing was written.

    An interrupt ends the call at once; every memory has the chunks written before it.
    """
    if errors not in ("raise", "return"):
        raise InputError(f"errors must be 'raise' or 'return', got {errors!r}")
    sources = [None] * len(memories) if sources is None else sources
    if isinstance(data, str) or not memories or not len(memories) == len(data) == len(sources):
        raise InputError(
            f"there must be one text, and one source if any, for each memory: got {len(memories)} memories, "
            f"{'one text' if isinstance(data, str) else f'{len(data)} texts'} and {len(sources)} sources"
        )
    reports, failed = _write(memories, data, sources, progress)
    if failed and errors == "raise":
        raise WriteTogetherError.of(reports, failed)
    return [failed.get(position, report) for position, report in enumerate(reports)]


def _write(
    memories: Sequence[Memory],
    data: Sequence[WriteData],
    sources: Sequence[SourceNames],
    progress: bool | None,
    facts: Mapping[str, Any] = NOTHING,
) -> tuple[list[WriteReport], dict[int, Exception]]:
    """Return what was written to each memory, and what failed, by position of the memory in the list."""
    begun = time.perf_counter()
    reports, errors = [WriteReport.nothing(getattr(memory, "batch_size", 0)) for memory in memories], {}
    writes: list[StreamWrite] = []
    positions: dict[int, int] = {}
    for position, memory in enumerate(memories):
        try:
            _check_one(memories, position, positions)
            writes += planned(memory, data[position], sources[position], reports[position], facts)
            positions[id(memory.streams)] = position
        except Exception as error:  # noqa: BLE001 - handed to the caller, once the others have been written
            errors[position] = error
    total = sum(len(ids) for write in writes for ids in write.chunks)
    turns = max((len(write.chunks) for write in writes), default=0)
    with ExitStack() as held:
        for _, position in sorted(positions.items()):  # in one order everywhere: two calls cannot wait for each other
            held.enter_context(memories[position].streams.write_lock)
        with progress_bar("writing", total, progress, steps=turns) as advance:
            failed = _write_all(writes, advance)
    errors |= {positions[key]: error for key, error in failed.items()}
    seconds = time.perf_counter() - begun
    return [evolve(report, seconds=seconds) for report in reports], dict(sorted(errors.items()))


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


def write_streams(writes: Sequence[StreamWrite], advance: Callable[[int], None] = lambda tokens: None) -> None:
    """Write all chunks of streams of one memory; the caller holds the write lock. Raises as ``Memory.write``."""
    for error in _write_all(writes, advance).values():
        raise error


@torch.no_grad()
def _write_all(writes: Sequence[StreamWrite], advance: Callable[[int], None]) -> dict[int, Exception]:
    """Write all chunks of all streams; the caller holds the write locks.

    Returns:
        What failed, by id of the memory's ``Streams``: nothing more was written to that one.
    """
    failed = _without_room(writes)
    for step in range(max((len(write.chunks) for write in writes), default=0)):
        present = [write for write in writes if step < len(write.chunks) and id(write.streams) not in failed]
        chunks = [write.chunks[step] for write in present]
        turns = {id(write.streams): _next_turn(write.streams.states) for write in present}
        for group in alike(chunks, [write.streams.states[write.row] for write in present]):
            sound = [at for at in group if id(present[at].streams) not in failed]
            if sound:
                ids = torch.stack([chunks[at] for at in sound])
                failed |= _write_pass([present[at] for at in sound], ids, turns, step)
            advance(sum(len(chunks[at]) for at in group))
    return failed


def _without_room(writes: Sequence[StreamWrite]) -> dict[int, Exception]:
    """Return the memories in which pinned rows leave no room for what is to be written, before anything changes."""
    failed: dict[int, Exception] = {}
    for write in writes:
        try:
            check_room(write.streams, [write.row] if write.chunks else [])
        except MemoryFullError as error:
            failed[id(write.streams)] = error
    return failed


def _next_turn(states: Sequence[StreamState]) -> int:
    """Return the turn (see ``mplus.memory.texts.Text``) of chunks that are written now to streams of one memory."""
    return 1 + max((state.texts.last_turn for state in states if state.texts is not None), default=-1)


def _write_pass(
    writes: Sequence[StreamWrite], ids: Tensor, turns: Mapping[int, int], step: int
) -> dict[int, Exception]:
    """Write a chunk ``[B, n]`` in one pass to streams that read equally many context rows.

    Args:
        writes: B of them.
        ids: the chunks.
        turns: by id of the memory's ``Streams``.
        step: number of the chunk in each of the writes.

    Returns:
        What failed, by the same id.
    """
    memories = {id(write.streams): write.streams for write in writes}
    try:
        made, finite = _encode(writes, ids, step)
    except Exception as error:  # noqa: BLE001 - handed to the caller, once the others have been written
        if len(memories) == 1:
            return dict.fromkeys(memories, error)
        return _write_halves(writes, ids, turns, step, list(memories))
    failed: dict[int, Exception] = {}
    for key, streams in memories.items():
        own = [at for at, write in enumerate(writes) if write.streams is streams]
        rows = [made[at] for at in own]
        try:
            for update in () if finite else rows:
                update.check_finite(ids.shape[1], streams.engine.mechanism.name)
            apply_write(streams, [writes[at] for at in own], rows, ids[own], turns[key])
        except Exception as error:  # noqa: BLE001 - as above
            failed[key] = error
    return failed


def _write_halves(
    writes: Sequence[StreamWrite], ids: Tensor, turns: Mapping[int, int], step: int, memories: Sequence[int]
) -> dict[int, Exception]:
    """Write in two passes what failed in one: a stream may have spoilt it for the others, or it was too large."""
    failed: dict[int, Exception] = {}
    for half in (memories[: len(memories) // 2], memories[len(memories) // 2 :]):
        own = [at for at, write in enumerate(writes) if id(write.streams) in half]
        failed |= _write_pass([writes[at] for at in own], ids[own], turns, step)
    return failed


def _encode(writes: Sequence[StreamWrite], ids: Tensor, step: int) -> tuple[list[Update] | list[NewEntries], bool]:
    """Run the pass of a chunk ``[B, n]``; return what it makes of each stream's, and whether all of it is finite."""
    engine, tokenizers = writes[0].streams.engine, {id(write.tokenizer) for write in writes}
    views = [write.view for write in writes]
    if engine.writes_text:
        new = engine.write_text(views, [write.passage(step) for write in writes])
        new.check(engine.mechanism.name)
        return [new.of(at) for at in range(len(writes))], True
    sources = [view.state.sources.find(write.name) for view, write in zip(views, writes, strict=True)]
    update = engine.write(views, ids.to(engine.device), writes[0].tokenizer if len(tokenizers) == 1 else None, sources)
    layouts = [view.store.layout for view in views]
    Update.check(update, engine.mechanism.name, len(writes), layouts)
    wanted = [bool(layout.projected_size) for layout in layouts]
    if any(wanted) and not update.projected:
        update = evolve(update, projected=tuple(engine.project(n, rows) for n, rows in enumerate(update.hidden)))
    each = [update.of(at) for at in range(len(writes))]
    made = [rows if own else evolve(rows, projected=()) for rows, own in zip(each, wanted, strict=True)]
    return made, update.finite


def apply_write(
    streams: Streams, writes: Sequence[StreamWrite], made: Sequence[Update | NewEntries], ids: Tensor, turn: int
) -> None:
    """Give streams of one memory the new rows of one chunk each, all or nothing; on disk when it returns.

    Args:
        streams: of the memory.
        writes: b of them.
        made: the new rows, or entries, of each.
        ids: ``[b, n]``, their chunks.
        turn: see ``mplus.memory.texts.Text``.
    """
    tokens, mechanism = ids.shape[1], streams.engine.mechanism
    kept: dict[int, Mapping[str, Sequence[Tensor]]] = {}
    counts: list[tuple[int, int]] = []

    now = read_clock(streams.clock)

    def absorb(states: list[StreamState]) -> None:
        for write, rows, text in zip(writes, made, ids, strict=True):
            row = write.row
            state, number = write.state.with_source(write.name, tokens, now, write.facts)
            state = state.with_text(text, number, turn)
            try:
                absorbed = mechanism.absorb(state, rows, number, _context(streams, row, state, text))
            except (IndexError, InputError) as error:  # of a store that was given rows it has no room for, say
                raise MechanismError(f"the mechanism {mechanism.name!r}: absorb failed: {error}") from error
            check_absorbed(absorbed, state, streams.stores[row].layout, mechanism.name)
            states[row] = write.noted(absorbed.state, number, tokens, absorbed.dropped, absorbed.evicted)
            kept[row] = absorbed.stayed
            counts.append((absorbed.dropped, absorbed.evicted))

    streams.change(absorb, kept)
    for write, (dropped, evicted) in zip(writes, counts, strict=True):
        write.report.count(write.row, tokens, dropped, evicted)
    streams.persistence.after_write(streams)


def _context(streams: Streams, row: int, state: StreamState, ids: Tensor) -> WriteContext:
    engine, generator, pinned = streams.engine, streams.generators[row], state.sources.pinned

    def keys(layer: int, hidden: Tensor) -> Tensor | None:
        made = engine.keys(layer, hidden)
        if made is not None:
            check_finite(made, f"in the retriever keys of layer {layer}")
        return made

    return WriteContext(
        store=streams.stores[row],
        eviction=streams.eviction,
        draw=lambda n: torch.randperm(n, generator=generator),
        keys=keys,
        ids=ids,
        capacity=streams.budget.capacity,
        access_log=streams.access_logs[row],
        pinned=pinned if len(pinned) else None,
    )
