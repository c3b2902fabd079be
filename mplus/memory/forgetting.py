"""Taking out of streams what was written from one source."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from attrs import evolve

from mplus.errors import InputError
from mplus.memory.stream import Source, StreamState
from mplus.stores.base import MemoryStore


def forget(states: list[StreamState], stores: Sequence[MemoryStore], rows: Iterable[int], source: str | None) -> int:
    """Remove the rows of ``source`` from ``states``, in place in the list, and from ``stores``.

    Args:
        states: all streams of a memory.
        stores: their stores.
        rows: batch rows to look at.
        source: a name that was given to ``write``.

    Returns:
        Rows removed, summed over layers and batch rows.

    Raises:
        InputError: none of these streams has this source.
    """
    removed, known = 0, False
    for row in rows:
        numbers = [n for n, entry in enumerate(states[row].sources) if entry.name == source and entry.chunks]
        for number in numbers:  # one at most
            known = True
            states[row], gone = _without(states[row], number)
            removed += gone + _remove(stores[row], number)
    if not known:
        names = sorted({repr(entry.name) for state in states for entry in state.sources if entry.chunks})
        raise InputError(f"source must be one of this memory's sources ({', '.join(names) or 'none'}), got {source!r}")
    return removed


def _without(state: StreamState, number: int) -> tuple[StreamState, int]:
    stm = tuple(rows.select(rows.source != number) for rows in state.stm)
    pending = tuple(rows.select(rows.source != number) for rows in state.pending)
    newest = tuple(state.kept(layer, rows.source != number) for layer, rows in enumerate(state.stm) if state.newest)
    gone = sum(map(len, (*state.stm, *state.pending))) - sum(map(len, (*stm, *pending)))
    # The entry keeps its place: other rows know their source by number.
    sources = tuple(Source(entry.name) if n == number else entry for n, entry in enumerate(state.sources))
    return evolve(state, stm=stm, pending=pending, newest=newest, sources=sources), gone


def _remove(store: MemoryStore, number: int) -> int:
    removed = 0
    for layer in range(store.layout.layers):
        gone = store.ids(layer)[store.column(layer, "source") == number]
        store.remove(layer, gone)
        removed += len(gone)
    return removed
