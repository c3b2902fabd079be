"""Write chunks to streams, of one memory or of many, a chunk of each at a time in shared passes; and what waits."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from attrs import evolve
from torch import Tensor

from mplus.errors import MemoryFullError
from mplus.memory.report import WriteReport
from mplus.memory.sources.clock import read_clock
from mplus.memory.sources.expiry import check_room
from mplus.memory.state import StreamState, alike
from mplus.memory.transaction import Streams, Sync
from mplus.memory.writing.change import ChunkChange, ReadChunk
from mplus.memory.writing.commit import SYNC_THREADS, commit_together, error_of
from mplus.memory.writing.free import check_free
from mplus.memory.writing.plan import StreamWrite, prepare_write
from mplus.memory.writing.update import NewEntries, Update


def write_streams(writes: Sequence[StreamWrite], advance: Callable[[int], None] = lambda tokens: None) -> None:
    """Write all chunks of streams of one memory; the caller holds the write lock. Raises as ``Memory.write``."""
    for error in write_all(writes, advance).values():
        raise error


@torch.no_grad()
def write_all(writes: Sequence[StreamWrite], advance: Callable[[int], None]) -> dict[int, Exception]:
    """Write all chunks of all streams; the caller holds the write locks.

    A chunk of each memory at a time: all of them are read, and then written, with their journals synced together.

    Returns:
        What failed, by id of the memory's ``Streams``: nothing more was written to that one.
    """
    failed = _without_room(writes)
    with ThreadPoolExecutor(SYNC_THREADS, "mplus-sync") as pool:
        for step in range(max((len(write.chunks) for write in writes), default=0)):
            present = [write for write in writes if step < len(write.chunks) and id(write.streams) not in failed]
            chunks = [write.chunks[step] for write in present]
            turns: dict[int, int] = {}  # see ``mplus.memory.texts.Text``: one for all streams of a memory
            for write in present:
                earlier = [state.texts.last_turn for state in write.streams.states if state.texts is not None]
                turns[id(write.streams)] = 1 + max(earlier, default=-1)
            unwritten: dict[int, ChunkChange] = {}
            for group in alike(chunks, [write.streams.states[write.row] for write in present]):
                for short in (False, True):
                    due = [at for at in group if present[at].short == short]
                    if any(id(present[at].streams) in unwritten for at in due):  # another stream of the same memory
                        failed |= _commit(unwritten, pool)
                        unwritten.clear()
                    sound = [at for at in due if id(present[at].streams) not in failed]
                    if sound:
                        ids = torch.stack([chunks[at] for at in sound])
                        read, unread = _read_pass([present[at] for at in sound], ids, step)
                        unwritten |= {id(one.streams): ChunkChange(one, turns[id(one.streams)]) for one in read}
                        failed |= unread
            failed |= _commit(unwritten, pool)
            advance(sum(map(len, chunks)))
        failed |= _keep_rests(writes, failed, pool)
    return failed


def _without_room(writes: Sequence[StreamWrite]) -> dict[int, Exception]:
    """Return the memories that have no room for what is to be written, before anything changes.

    Pinned rows leave none, or what is free of RAM or disk does not.
    """
    failed: dict[int, Exception] = {}
    left: dict[torch.device, int | None] = {}
    for key, streams in {id(write.streams): write.streams for write in writes}.items():
        own = [write for write in writes if write.streams is streams and write.chunks]
        try:
            check_room(streams, [write.row for write in own])
            if own and not streams.engine.writes_text:
                check_free(streams, own, left)
        except MemoryFullError as error:
            failed[key] = error
    return failed


def _read_pass(writes: Sequence[StreamWrite], ids: Tensor, step: int) -> tuple[list[ReadChunk], dict[int, Exception]]:
    """Read a chunk ``[B, n]`` in one pass for streams that read equally many context rows.

    Args:
        writes: B of them.
        ids: the chunks.
        step: number of the chunk in each of the writes.

    Returns:
        What was read, of each memory; and what failed, by id of the memory's ``Streams``.
    """
    memories = {id(write.streams): write.streams for write in writes}
    try:
        made, finite = _encode(writes, ids, step)
    except Exception as error:  # noqa: BLE001 - handed to the caller, once the others have been written
        if len(memories) == 1:
            return [], dict.fromkeys(memories, error)
        return _read_halves(writes, ids, step, list(memories))
    read = []
    for streams in memories.values():
        own = [at for at, write in enumerate(writes) if write.streams is streams]
        read.append(ReadChunk(streams, [writes[at] for at in own], [made[at] for at in own], ids[own], finite))
    return read, {}


def _read_halves(
    writes: Sequence[StreamWrite], ids: Tensor, step: int, memories: Sequence[int]
) -> tuple[list[ReadChunk], dict[int, Exception]]:
    """Read in two passes what failed in one: a stream may have spoilt it for the others, or it was too large."""
    read: list[ReadChunk] = []
    failed: dict[int, Exception] = {}
    for half in (memories[: len(memories) // 2], memories[len(memories) // 2 :]):
        own = [at for at, write in enumerate(writes) if id(write.streams) in half]
        some, unread = _read_pass([writes[at] for at in own], ids[own], step)
        read, failed = [*read, *some], failed | unread
    return read, failed


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


def _commit(changes: Mapping[int, ChunkChange | RestChange], pool: ThreadPoolExecutor) -> dict[int, Exception]:
    """Make changes of different memories, by id of their ``Streams``; return what failed, by the same id."""
    failed = commit_together({key: change.make for key, change in changes.items()}, pool)
    for key, change in changes.items():
        if key not in failed and (error := error_of(change.finish)) is not None:
            failed[key] = error
    return failed


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


def _keep_rests(
    writes: Sequence[StreamWrite], failed: Mapping[int, Exception], pool: ThreadPoolExecutor
) -> dict[int, Exception]:
    """Let what is too short for a chunk wait, in each memory that has not failed; return what failed now."""
    found: dict[int, Exception] = {}
    changes: dict[int, RestChange] = {}
    for key, streams in {id(write.streams): write.streams for write in writes if write.rest is not None}.items():
        if key not in failed:
            change = RestChange(streams, [write for write in writes if write.streams is streams])
            if (error := error_of(change.make_room)) is None:
                changes[key] = change
            else:
                found[key] = error
    return found | _commit(changes, pool)


class RestChange:
    """The change in which text that is too short for a chunk comes to wait in streams of one memory."""

    def __init__(self, streams: Streams, writes: Sequence[StreamWrite]) -> None:
        self._streams, states = streams, streams.states
        self._rests = {write.row: (write, write.rest) for write in writes if write.rest is not None}
        self._changed = {
            row: (write, rest)
            for row, (write, rest) in self._rests.items()
            if len(rest) != len(states[row].waiting(write.name))
        }
        self._added: dict[int, int] = {}

    def make_room(self) -> None:
        """Write what has waited longest, where too much would wait. Raises as ``Memory.write``."""
        states = self._streams.states
        for row, (write, rest) in self._changed.items():
            names = [states[row].sources[part.source].name for part in states[row].tail]
            others = [name for name in names if name != write.name]
            room = self._streams.engine.config.chunk_tokens - len(rest)
            while sum(len(states[row].waiting(name)) for name in others) > room:
                write_streams([tail_write(self._streams, row, others.pop(0), write.report)])

    def make(self, sync: Sync) -> None:
        """Make the change, on disk when this returns; ``sync``: as for ``Persistence.commit``."""
        if self._changed:
            now = read_clock(self._streams.clock)
            kept: dict[int, dict[str, list[Tensor]]] = {row: {} for row in self._changed}  # of rows, nothing changes
            self._streams.change(lambda states: self._keep(states, now), kept, sync)

    def finish(self) -> None:
        """Count the change, and do what is due after it. Raises as ``Persistence.after_write``."""
        for row, (write, rest) in self._rests.items():
            write.report.tokens[row] += self._added.get(row, 0)
            write.report.tail_tokens[row] = len(rest)
        if self._changed:
            self._streams.persistence.after_write(self._streams)

    def _keep(self, states: list[StreamState], now: float) -> None:
        for row, (write, rest) in self._changed.items():
            new = len(rest) - len(states[row].waiting(write.name))
            state, number = states[row].with_source(write.name, new, now, write.facts, chunks=0)
            states[row] = write.noted(state.with_waiting(number, rest), number, new)
            self._added[row] = new
