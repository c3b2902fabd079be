"""Which sources are forgotten by the clock, and which are pinned: kept from eviction."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta

import torch
from attrs import evolve

from mplus.errors import MemoryFullError, NotSupported
from mplus.memory.draft import adopt_draft, draft_of
from mplus.memory.report import ForgetReport
from mplus.memory.sources.clock import expiry_of, read_clock
from mplus.memory.sources.forget import check_known, drop_source
from mplus.memory.sources.source import SourceMarks
from mplus.memory.state import StreamState
from mplus.memory.transaction import Streams
from mplus.stores.base import StoreView


def expire(streams: Streams, now: float | None = None) -> list[ForgetReport]:
    """Forget every source whose time has come, as one change; nothing is changed where there is none.

    Args:
        streams: of a memory.
        now: in seconds since 1970 (UTC); None: by the clock of the memory.

    Returns:
        What was forgotten, a report for each name.

    Raises:
        LiveMemoryError, MemoryFileError: as any change; all is as before.
    """
    if all(state.sources.earliest_expiry is None for state in streams.states):
        return []
    now = read_clock(streams.clock) if now is None else now
    with streams.write_lock:
        rows = due_sources(streams.states, now)
        if not rows:
            return []
        streams.check_writable()
        draft = draft_of(streams)
        reports = [drop_source(draft, own, name, keep_name=False) for name, own in rows.items()]
        adopt_draft(streams, draft, removed=True)
        streams.persistence.check_removed()
    return reports


def facts_of(streams: Streams, expires: datetime | timedelta | None) -> SourceMarks:
    """Return what a write sets of its source besides counts and times: when it expires. Raises InputError."""
    return {} if expires is None else {"expires": expiry_of(expires, streams.clock)}


def due_sources(states: Sequence[StreamState], now: float) -> dict[str | None, list[int]]:
    """Return the names of the sources that expire up to ``now``, and in which batch rows."""
    rows: dict[str | None, list[int]] = {}
    for row, state in enumerate(states):
        first = state.sources.earliest_expiry
        for source in state.sources if first is not None and first <= now else ():
            if source.expires is not None and source.expires <= now:
                rows.setdefault(source.name, []).append(row)
    return rows


def pin(streams: Streams, rows: Iterable[int], source: str | None, *, pinned: bool) -> None:
    """Keep the rows of a source from eviction, or let them leave again; see ``Memory.pin``."""
    rows, mechanism = list(rows), streams.engine.mechanism
    if pinned and not mechanism.keeps_pinned:
        raise NotSupported(
            f"rows of this memory leave it without an eviction policy (mechanism {mechanism.name!r}, "
            f"long_term_tokens {streams.engine.config.long_term_tokens}), so that none can be pinned"
        )

    with streams.write_lock:
        streams.change(lambda states: mark_pinned(states, rows, source, pinned=pinned), {})


def mark_pinned(states: list[StreamState], rows: Iterable[int], source: str | None, *, pinned: bool) -> bool:
    """Mark a source of some of the states, in place in the list; return True where that changes anything."""
    rows, changed = list(rows), False
    check_known(states, rows, source)
    for row in rows:
        sources, number = states[row].sources, states[row].sources.find(source)
        if number is not None and sources[number].pinned != pinned:
            sources = sources.having(number, evolve(sources[number], pinned=pinned))
            states[row], changed = evolve(states[row], sources=sources), True
    return changed


def check_room(streams: Streams, rows: Iterable[int]) -> None:
    """Raise MemoryFullError where pinned rows leave no room for those of another chunk."""
    capacity, chunk = streams.budget.capacity, streams.engine.config.memory_tokens_per_chunk
    for row in rows:
        pinned = streams.states[row].sources.pinned
        if capacity is None or not len(pinned):
            continue
        held = max(_held(streams.stores[row], layer, pinned) for layer in range(streams.stores[row].layout.layers))
        if held + chunk > capacity:
            raise MemoryFullError(
                f"{held} of the {capacity} long-term rows that a layer of batch row {row} may hold are of pinned "
                f"sources, which leaves no room for a chunk of {chunk} rows: unpin or forget a source, or give the "
                "memory more capacity; nothing was written"
            )


def _held(store: StoreView, layer: int, numbers: torch.Tensor) -> int:
    """Return how many rows of a layer come from the sources with these numbers."""
    count = 0
    for chunk in store.chunks(layer, "source"):
        own = torch.isin(chunk.columns["source"], numbers.to(chunk.ids.device))
        count += int((own if chunk.live is None else own & chunk.live).sum())
    return count
