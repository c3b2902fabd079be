"""Merge two memories of one decoder: all that the other one holds comes into this one, as one change."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from attrs import evolve

from mplus.errors import InputError, MechanismError, MemoryMismatchError
from mplus.memory.copying import copied
from mplus.memory.draft import adopt_draft, draft_of
from mplus.memory.merging.incoming import Incoming
from mplus.memory.merging.order import Order, Runs
from mplus.memory.merging.sources import CLASHES, Clash, MergedSources
from mplus.memory.recompute import refresh_if_stale
from mplus.memory.report import MergeReport, WriteReport
from mplus.memory.sources.expiry import expire
from mplus.memory.sources.source import SourceMarks
from mplus.memory.state import StreamState, StreamView
from mplus.memory.texts import Text, Texts
from mplus.memory.transaction import Streams
from mplus.memory.writing.change import context_of
from mplus.memory.writing.passes import write_streams
from mplus.memory.writing.plan import StreamWrite, check_dtype, prepare_write
from mplus.memory.writing.update import check_absorbed
from mplus.tokenizer import Tokenizer

if TYPE_CHECKING:
    from mplus.memory.memory import Memory


def merge(streams: Streams, tokenizer: Tokenizer | None, other: Memory, sources: Clash) -> MergeReport:
    """Take what another memory holds into the streams of one; see ``Memory.merge``, and raises as that."""
    begun = time.perf_counter()
    _check(streams, other, sources)
    copy = copied(other.streams, range(len(streams)))  # reads and writes of the other one go on meanwhile
    copy.clock = streams.clock
    expire(copy)
    refresh_if_stale(copy, writing=range(len(copy)))
    with streams.write_lock:
        prepare_write(streams, range(len(streams)))
        draft = draft_of(streams)
        report = WriteReport.nothing(len(streams))
        merged = draft.change(lambda states: _combine(draft, states, copy, sources, report))
        names = [
            {there.name: state.sources[found.numbers[number]].name for number, there in theirs.sources.items()}
            for state, theirs, found in zip(draft.states, copy.states, merged, strict=True)
        ]
        _write_tails(draft, copy, merged, tokenizer, report)
        adopt_draft(streams, draft, removed=False)
    return MergeReport(
        sources=names,
        tokens=[sum(source.tokens for source in state.sources) for state in copy.states],
        chunks=[sum(source.chunks for source in state.sources) for state in copy.states],
        dropped_rows=report.dropped_rows,
        evicted_rows=report.evicted_rows,
        unnoted_writes=[list(found.unnoted) for found in merged],
        seconds=time.perf_counter() - begun,
    )


def _check(streams: Streams, other: Memory, sources: Clash) -> None:
    """Refuse what cannot be merged, before anything is copied."""
    if sources not in CLASHES:
        raise InputError(f"sources must be 'join', 'rename' or 'refuse', got {sources!r}")
    theirs = getattr(other, "streams", None)
    if not isinstance(theirs, Streams):
        raise InputError(f"merge takes another mplus.Memory, got {type(other).__name__}")
    if theirs is streams:
        raise InputError("a memory cannot be merged into itself, which would hold every text twice: pass another one")
    if len(theirs) != len(streams):
        raise MemoryMismatchError(
            f"memories that are merged must have one batch size, got {len(streams)} and {len(theirs)}: use "
            "select(rows) to take the batch rows that belong together"
        )
    streams.check_writable()
    _check_decoder(streams, theirs)
    check_dtype(theirs.dtype, streams.dtype)
    # Where rows are, and whether they expire, may differ.
    own, new = (evolve(one.stores[0].layout, device=torch.device("cpu"), expiry=False) for one in (streams, theirs))
    if own != new:
        raise MemoryMismatchError(
            f"memories that are merged must keep the same of their rows, got {own.columns()} and {new.columns()}: make "
            "both with the same memory_rows"
        )
    if streams.keeps_text and not theirs.keeps_text:
        raise MemoryMismatchError(
            "this memory keeps its texts and the other one does not, so that what is merged could not be written again "
            "(forget with mode='rebuild'): make both with keep_text=True, or merge this one into the other"
        )


def _check_decoder(streams: Streams, other: Streams) -> None:
    """Raise MemoryMismatchError, with what differs, unless memories of both are read by one decoder."""
    if other.engine is streams.engine:
        return
    own, new = streams.engine.fingerprint(), other.engine.fingerprint()
    differences = [
        f"{name} is {own.get(name)!r} here and {new.get(name)!r} there"
        for name in {**own, **new}
        if own.get(name) != new.get(name)
    ]
    if differences:
        raise MemoryMismatchError(
            f"memories that are merged must belong to one decoder, but {'; '.join(differences)}: make the other one "
            "anew for this decoder with mplus.rewrite_memory, where it keeps its text"
        )


def _combine(
    draft: Streams, states: list[StreamState], other: Streams, sources: Clash, report: WriteReport
) -> list[MergedSources]:
    """Let the mechanism take every stream of another memory into the state and store of the same batch row.

    Returns:
        The sources of each row; ``report`` counts the rows that leave.
    """
    found = list[MergedSources]()
    mechanism = draft.engine.mechanism
    new = draft.engine.new_state(draft.stores[0].layout)
    begun = any(rows.source.lt(0).any() for parts in new.row_lists().values() for rows in parts)
    for row, (state, theirs) in enumerate(zip(states, other.states, strict=True)):
        merged = MergedSources.of(state, theirs, sources)
        view = StreamView(theirs, other.stores[row], other.access_logs[row])
        order = Order.of(Runs.in_view(StreamView(state, draft.stores[row])), Runs.in_view(view))
        incoming = Incoming(view, merged.numbers, order, mechanism.lifetime(draft.eviction), bool(begun))
        texts = None if state.texts is None else _texts(state, theirs, merged)
        given = evolve(state, sources=merged.table, writes=merged.writes, texts=texts)
        absorbed = mechanism.combine(given, incoming, context_of(draft, row, given))
        check_absorbed(absorbed, given, draft.stores[row].layout, mechanism.name)
        if absorbed.state.clock != order.clock:
            raise MechanismError(
                f"the mechanism {mechanism.name!r}: combine must return a state whose clock is {order.clock}, got "
                f"{absorbed.state.clock}"
            )
        states[row] = absorbed.state
        found.append(merged)
        report.count(row, 0, absorbed.dropped, absorbed.evicted)
    return found


def _texts(own: StreamState, other: StreamState, merged: MergedSources) -> Texts:
    """Return the kept texts of both streams in one order, each with a turn of its own."""
    kept = [[] if state.texts is None else state.texts.chunks() for state in (own, other)]
    runs = []
    for state, texts in zip((own, other), kept, strict=True):
        numbers = torch.tensor([text.source for text in texts], dtype=torch.int64)
        runs.append(Runs.of(torch.arange(len(texts)), numbers, state.sources, len(texts)))
    order = Order.of(*runs)
    theirs = [evolve(text, source=merged.numbers[text.source]) for text in kept[1]]
    places = torch.cat([order.own(torch.arange(len(kept[0]))), order.other(torch.arange(len(theirs)))]).tolist()
    placed: list[tuple[int, Text]] = sorted(zip(places, [*kept[0], *theirs], strict=True), key=lambda pair: pair[0])
    generator = torch.empty(0) if own.texts is None else own.texts.generator
    return Texts.of(generator, (evolve(text, turn=place) for place, text in placed))


def _write_tails(
    draft: Streams, other: Streams, merged: Sequence[MergedSources], tokenizer: Tokenizer | None, report: WriteReport
) -> None:
    """Write the text that waits in streams of another memory, so that it waits here, with what waits already."""
    for row, (state, found) in enumerate(zip(other.states, merged, strict=True)):
        for part in state.tail:
            here = draft.states[row].sources[found.numbers[part.source]]
            facts: SourceMarks = {"last_time": here.last_time}
            one = StreamWrite(draft, row, [], here.name, report, tokenizer, texts=[part.ids.long()], facts=facts)
            write_streams([one.cut()])
