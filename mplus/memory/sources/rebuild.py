"""Forgetting: of a source by dropping its rows or by writing all other texts again, or of everything."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import evolve
from torch import Tensor

from mplus.errors import InputError
from mplus.memory.recompute import refresh_if_stale
from mplus.memory.report import ForgetReport, WriteReport, progress_bar
from mplus.memory.sources.forget import check_known, forgotten_names, held, names_to_keep, with_names
from mplus.memory.sources.source import Source, SourceMarks
from mplus.memory.state import StreamState
from mplus.memory.texts import Texts
from mplus.memory.transaction import Streams
from mplus.memory.writing.passes import write_streams
from mplus.memory.writing.plan import StreamWrite, check_dtype
from mplus.stores.base import MemoryStore
from mplus.stores.sharing import unshared


def marks_of(source: Source) -> SourceMarks:
    """Return the times and marks that a source keeps when it is written anew."""
    return {
        "time": source.time,
        "last_time": source.last_time,
        "expires": source.expires,
        "pinned": source.pinned,
        "write_id": source.write_id,
    }


def reset(streams: Streams) -> None:
    """Remove everything; see ``Memory.reset``."""

    def clear(states: list[StreamState]) -> None:
        for row, store in enumerate(streams.stores):
            texts = None if states[row].texts is None else Texts.of(streams.generators[row].get_state())
            states[row] = evolve(streams.engine.new_state(store.layout), texts=texts)
            _empty(store)

    streams.change(clear)


def rebuild_without(
    streams: Streams, rows: Sequence[int], source: str | None, *, keep_name: bool, progress: bool | None
) -> ForgetReport:
    """Replace all rows by those that writing the other texts makes; see ``Memory.forget``. Raises as that."""
    other, report = _rebuilt(streams, rows, source, progress)
    names = names_to_keep(streams.states, rows, source, keep_name=keep_name)

    def become(states: list[StreamState]) -> None:
        states[:] = map(_with_writes, map(with_names, other.states, names), states)
        streams.adopt(other)

    streams.change(become)
    return report


def _rebuilt(
    streams: Streams, rows: Sequence[int], source: str | None, progress: bool | None
) -> tuple[Streams, ForgetReport]:
    """Return streams that were written as ``streams`` were, but without ``source`` in the batch rows ``rows``.

    Chunks that were due at once are again: what shared a pass then shares one now, but for what is left out. So the
    result is, bit for bit, what writing the other texts in the first place would have given, in the same chunks, and
    what waits of them waits again. (Passes shared with other memories, by ``write_together``, are not shared again;
    sums over a batch may then round differently.)

    Args:
        streams: stay as they are; the caller holds their write lock.
        rows: batch rows.
        source: a name that was given to ``write``.
        progress: as for ``Memory.forget``.

    Raises:
        InputError: no stream has this source, or the memory does not keep its texts.
        MemoryMismatchError, NonFiniteError: as ``Memory.write``.
    """
    states = streams.states
    check_known(states, rows, source)
    if streams.engine.writes_text:
        raise InputError(
            "mode='rebuild' is for memories of rows, which may hold something of other sources; entries of a memory of "
            "text are made of one source each: use mode='drop'"
        )
    if not streams.keeps_text:
        raise InputError(
            "mode='rebuild' needs the texts that were written, and this memory does not keep them: make memories with "
            "new_memory(keep_text=True), or use mode='drop'"
        )
    refresh_if_stale(streams)
    report, written = held(states, streams.stores, rows, source), WriteReport.nothing(len(streams))
    left_out = {row: states[row].sources.find(source) for row in rows}
    return _written_anew(streams, left_out, written, progress), evolve(report, rebuilt=sum(written.chunks))


def rebuild_all(streams: Streams, report: WriteReport, progress: bool | None) -> None:
    """Replace all rows of a memory that keeps its texts by those that writing them makes now; see ``Memory.rewrite``.

    Args:
        streams: of the memory; the caller holds their write lock.
        report: counts what was written.
        progress: as for ``Memory.rewrite``.
    """
    other = _written_anew(streams, {}, report, progress)
    names = [forgotten_names(state) for state in streams.states]

    def become(states: list[StreamState]) -> None:
        states[:] = map(with_names, other.states, names)
        streams.adopt(other)

    streams.change(become)


def _written_anew(
    streams: Streams, left_out: dict[int, int | None], written: WriteReport, progress: bool | None
) -> Streams:
    """Return streams of the same texts but those of the sources ``left_out``, by batch row, as they are written now."""
    states = streams.states
    check_dtype(streams.dtype, streams.engine.dtype)
    turns = _turns(states, left_out)
    fresh = _blank(streams)
    total = sum(len(ids) for turn in turns for _, _, ids, _ in turn)
    with progress_bar("rebuilding", total, progress, steps=len(turns)) as advance:
        for turn in turns:
            again = [
                StreamWrite(fresh, row, [ids], name, written, facts=_facts(states[row], name), short=short)
                for row, name, ids, short in turn
            ]
            write_streams(again, advance)
    fresh.change(lambda after: _keep_tails(states, after, left_out))
    return fresh


def _with_writes(state: StreamState, before: StreamState) -> StreamState:
    """Return a stream that was written anew with the writes noted ``before`` of the sources that it has."""
    numbers = {number: state.sources.find(source.name) for number, source in before.sources.items()}
    kept = [(record, numbers[record.source]) for record in before.writes]
    writes = state.writes.noting(evolve(record, source=number) for record, number in kept if number is not None)
    return evolve(state, writes=writes) if len(writes) else state


def _keep_tails(before: Sequence[StreamState], after: list[StreamState], left_out: dict[int, int | None]) -> None:
    """Let all text that waited wait again, but for that of the sources that are left out."""
    for row, state in enumerate(before):
        for part in state.tail:
            if part.source != left_out.get(row):
                name = state.sources[part.source].name
                with_source = after[row].with_source(name, len(part.ids), facts=_facts(state, name), chunks=0)
                after[row] = with_source[0].with_waiting(with_source[1], part.ids)


def _facts(state: StreamState, name: str | None) -> SourceMarks:
    """Return what a source of this name keeps when it is written anew; nothing where there is none."""
    number = state.sources.find(name)
    return {} if number is None else marks_of(state.sources[number])


def _turns(
    states: Sequence[StreamState], left_out: dict[int, int | None]
) -> list[list[tuple[int, str | None, Tensor, bool]]]:
    """Return the chunks to write in each turn: batch row, name of the source, ids ``[n]`` int64, and ``Text.short``."""
    due: dict[int, list[tuple[int, str | None, Tensor, bool]]] = {}
    for row, state in enumerate(states):
        for text in () if state.texts is None else state.texts.chunks():
            if text.source != left_out.get(row):
                name = state.sources[text.source].name
                # Chunks of different streams that shared a pass have one turn, and share one again.
                due.setdefault(text.turn, []).append((row, name, text.ids.to(torch.int64), text.short))
    return [due[turn] for turn in sorted(due)]


def _blank(streams: Streams) -> Streams:
    """Return streams without rows, like ``streams`` were when they were new, kept in memory only.

    They have the same draws, kinds of store, policy and budget.
    """
    states, generators = [], []
    for state, store in zip(streams.states, streams.stores, strict=True):
        if state.texts is not None:
            # As it was when the stream was new, so that the same rows are drawn to leave.
            generators.append(torch.Generator().set_state(state.texts.generator))
            new = state.restarted(streams.engine.new_state(store.layout))
            states.append(evolve(new, texts=Texts.of(state.texts.generator)))
    stores = blank_stores(streams)
    return Streams(streams.engine, states, stores, generators, streams.eviction, streams.budget, clock=streams.clock)


def blank_stores(streams: Streams) -> list[MemoryStore]:
    """Return a store without rows for each stream, of the kind that it has."""
    return [_empty(store.fork()) for store in unshared(streams.stores)]


def _empty(store: MemoryStore) -> MemoryStore:
    for layer in range(store.layout.layers):
        store.remove(layer, store.ids(layer))
    return store
