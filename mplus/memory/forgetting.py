"""Taking out of streams what was written from one source."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from attrs import evolve
from torch import Tensor

from mplus.errors import InputError
from mplus.memory.report import ForgetReport
from mplus.memory.stream import Source, StreamState
from mplus.stores.base import MemoryStore, StoreView


def check_known(states: Sequence[StreamState], rows: Iterable[int], source: str | None) -> None:
    """Raises InputError, with the sources there are, unless one of the batch rows ``rows`` has this source."""
    if not any(numbers_of(states[row], source) for row in rows):
        names = sorted({repr(entry.name) for state in states for entry in state.sources if entry.chunks})
        raise InputError(f"source must be one of this memory's sources ({', '.join(names) or 'none'}), got {source!r}")


def numbers_of(state: StreamState, source: str | None) -> list[int]:
    """Numbers under which a stream knows a source that it was written from: one, or none."""
    return [number for number, entry in enumerate(state.sources) if entry.name == source and entry.chunks]


def forget(
    states: list[StreamState], stores: Sequence[MemoryStore], rows: Iterable[int], source: str | None
) -> ForgetReport:
    """Remove the rows of ``source``, and its texts, from ``states``, in place in the list, and from ``stores``.

    Args:
        states: all streams of a memory.
        stores: their stores.
        rows: batch rows to look at.
        source: a name that was given to ``write``.

    Raises:
        InputError: none of these streams has this source.
    """
    rows = list(rows)
    check_known(states, rows, source)
    report = held(states, stores, rows, source)
    for row in rows:
        for number in numbers_of(states[row], source):
            states[row] = _without(states[row], number)
            for layer in range(stores[row].layout.layers):
                stores[row].remove(layer, _written_from(stores[row], layer, number))
    return report


def held(
    states: Sequence[StreamState], stores: Sequence[StoreView], rows: Iterable[int], source: str | None
) -> ForgetReport:
    """What ``forget`` would remove."""
    layers = range(stores[0].layout.layers)
    tokens = chunks = 0
    short, waiting, long = ([0] * len(layers) for _ in range(3))
    for row in rows:
        state, store = states[row], stores[row]
        for number in numbers_of(state, source):
            tokens += state.sources[number].tokens
            chunks += state.sources[number].chunks
            for layer in layers:
                short[layer] += int((state.stm[layer].source == number).sum())
                waiting[layer] += int((state.pending[layer].source == number).sum())
                long[layer] += len(_written_from(store, layer, number))
    return ForgetReport(source, tokens, chunks, tuple(short), tuple(waiting), tuple(long))


def _without(state: StreamState, number: int) -> StreamState:
    # The entry keeps its place: other rows know their source by number.
    sources = tuple(Source(entry.name) if n == number else entry for n, entry in enumerate(state.sources))
    return evolve(
        state,
        stm=tuple(rows.select(rows.source != number) for rows in state.stm),
        pending=tuple(rows.select(rows.source != number) for rows in state.pending),
        newest=tuple(state.kept(layer, rows.source != number) for layer, rows in enumerate(state.stm) if state.newest),
        texts=None if state.texts is None else state.texts.without(number),
        sources=sources,
    )


def _written_from(store: StoreView, layer: int, number: int) -> Tensor:
    """Ids of the rows of a layer that come from one source."""
    found = []
    for piece in store.pieces(layer, "source"):
        own = piece.columns["source"] == number
        found.append(piece.ids[own if piece.live is None else own & piece.live])
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64)
