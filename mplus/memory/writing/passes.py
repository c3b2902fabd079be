"""Write chunks to streams, of one memory or of many, a chunk of each at a time in shared passes; and what waits."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from attrs import evolve
from torch import Tensor

from mplus.errors import InputError, MechanismError, MemoryFullError
from mplus.memory.report import WriteReport
from mplus.memory.sources.clock import read_clock
from mplus.memory.sources.expiry import check_room
from mplus.memory.state import StreamState, alike
from mplus.memory.transaction import Streams
from mplus.memory.writing.free import check_free
from mplus.memory.writing.plan import StreamWrite, prepare_write
from mplus.memory.writing.update import NewEntries, Update, WriteContext, check_absorbed, check_finite


def write_streams(writes: Sequence[StreamWrite], advance: Callable[[int], None] = lambda tokens: None) -> None:
    """Write all chunks of streams of one memory; the caller holds the write lock. Raises as ``Memory.write``."""
    for error in write_all(writes, advance).values():
        raise error


@torch.no_grad()
def write_all(writes: Sequence[StreamWrite], advance: Callable[[int], None]) -> dict[int, Exception]:
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
            for short in (False, True):
                sound = [at for at in group if id(present[at].streams) not in failed and present[at].short == short]
                if sound:
                    ids = torch.stack([chunks[at] for at in sound])
                    failed |= _write_pass([present[at] for at in sound], ids, turns, step)
            advance(sum(len(chunks[at]) for at in group))
    for streams in {id(write.streams): write.streams for write in writes if write.rest is not None}.values():
        if id(streams) not in failed:
            try:
                _keep_rests(streams, [write for write in writes if write.streams is streams])
            except Exception as error:  # noqa: BLE001 - handed to the caller, once the others have been written
                failed[id(streams)] = error
    return failed


def _without_room(writes: Sequence[StreamWrite]) -> dict[int, Exception]:
    """Return the memories that have no room for what is to be written, before anything changes.

    Pinned rows leave none, or what is free of RAM or disk does not.
    """
    failed: dict[int, Exception] = {}
    for key, streams in {id(write.streams): write.streams for write in writes}.items():
        own = [write for write in writes if write.streams is streams and write.chunks]
        try:
            check_room(streams, [write.row for write in own])
            if own and not streams.engine.writes_text:
                check_free(streams, own)
        except MemoryFullError as error:
            failed[key] = error
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
    tokenizer = writes[0].tokenizer if len(tokenizers) == 1 else None
    update = engine.write(views, ids.to(engine.device), tokenizer, sources, writes[0].short)
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
    counts: list[tuple[int, int, int]] = []

    now = read_clock(streams.clock)

    def absorb(states: list[StreamState]) -> None:
        for write, rows, text in zip(writes, made, ids, strict=True):
            row, before = write.row, write.state
            waited = before.waiting(write.name) if write.rest is not None else text[:0]
            new = max(tokens - len(waited), 0)
            state, number = before.with_source(write.name, new, now, write.facts)
            state = state.with_text(text, number, turn, write.short)
            state = state.with_waiting(number, waited[tokens:]) if len(waited) else state
            try:
                absorbed = mechanism.absorb(state, rows, number, context_of(streams, row, state, text))
            except (IndexError, InputError) as error:  # of a store that was given rows it has no room for, say
                raise MechanismError(f"the mechanism {mechanism.name!r}: absorb failed: {error}") from error
            check_absorbed(absorbed, state, streams.stores[row].layout, mechanism.name)
            states[row] = write.noted(absorbed.state, number, new, absorbed.dropped, absorbed.evicted, chunks=1)
            kept[row] = absorbed.stayed
            counts.append((new, absorbed.dropped, absorbed.evicted))

    streams.change(absorb, kept)
    for write, (new, dropped, evicted) in zip(writes, counts, strict=True):
        write.report.count(write.row, new, dropped, evicted)
    streams.persistence.after_write(streams)


def context_of(streams: Streams, row: int, state: StreamState, ids: Tensor | None = None) -> WriteContext:
    """Return what a mechanism may use and change while a stream takes in rows; part of a change of ``streams``.

    Args:
        streams: of the memory.
        row: the batch row.
        state: of the stream, for the sources that are pinned.
        ids: ``[n]``, the text that the rows were made of, if it is one.
    """
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


# ---------------------------------------------------------------------- what waits


def flush(streams: Streams) -> WriteReport:
    """Write all text that waits, source by source, however short it is; see ``Memory.flush``."""
    begun, report = time.perf_counter(), WriteReport.nothing(len(streams))
    with streams.write_lock:
        rows = [row for row, state in enumerate(streams.states) if state.tail]
        if rows:
            prepare_write(streams, rows)
        while rows:
            due = [(row, streams.states[row]) for row in rows]
            for row, state in due:
                report.tokens[row] += len(state.tail[0].ids)
            firsts = [tail_write(streams, row, state.sources[state.tail[0].source].name, report) for row, state in due]
            write_streams(firsts)
            rows = [row for row in rows if streams.states[row].tail]
    return evolve(report, seconds=time.perf_counter() - begun)


def tail_write(streams: Streams, row: int, name: str | None, report: WriteReport) -> StreamWrite:
    """Return the write of what waits under ``name`` in a stream, however short it is."""
    ids = streams.states[row].waiting(name)
    short = len(ids) < streams.engine.mechanism.shortest_text
    return StreamWrite(streams, row, [ids], name, report, rest=ids[:0], short=short)


def _keep_rests(streams: Streams, writes: Sequence[StreamWrite]) -> None:
    """Let what is too short for a chunk wait; where too much would, write first what has waited longest."""
    states = streams.states
    rests = {write.row: (write, write.rest) for write in writes if write.rest is not None}
    changed = {r: pair for r, pair in rests.items() if len(pair[1]) != len(states[r].waiting(pair[0].name))}
    for row, (write, rest) in changed.items():
        names = [states[row].sources[part.source].name for part in states[row].tail]
        others = [name for name in names if name != write.name]
        room = streams.engine.config.chunk_tokens - len(rest)
        while sum(len(states[row].waiting(name)) for name in others) > room:
            write_streams([tail_write(streams, row, others.pop(0), write.report)])
    added: dict[int, int] = {}
    now = read_clock(streams.clock)

    def change(states: list[StreamState]) -> None:
        for row, (write, rest) in changed.items():
            new = len(rest) - len(states[row].waiting(write.name))
            state, number = states[row].with_source(write.name, new, now, write.facts, chunks=0)
            states[row] = write.noted(state.with_waiting(number, rest), number, new)
            added[row] = new

    if changed:
        streams.change(change, {row: {} for row in changed})  # of rows, nothing changes
        streams.persistence.after_write(streams)
    for row, (write, rest) in rests.items():
        write.report.tokens[row] += added.get(row, 0)
        write.report.tail_tokens[row] = len(rest)
