"""Forget: remove from streams what was written from one source."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from attrs import evolve
from torch import Tensor

from mplus.errors import InputError
from mplus.memory.report import ForgetReport
from mplus.memory.sources.listing import stored
from mplus.memory.sources.source import Source
from mplus.memory.state import LONG_TERM, StreamState, StreamView
from mplus.memory.transaction import Streams
from mplus.stores.base import MemoryStore, StoreView
from mplus.stores.sharing import distinct


def drop_source(streams: Streams, rows: Sequence[int], source: str | None, *, keep_name: bool) -> ForgetReport:
    """Remove the rows of ``source``, and nothing else; see ``Memory.forget``. Raises as that."""
    report = streams.change(lambda states: forget(states, streams.stores, rows, source, keep_name=keep_name))
    for store in distinct(streams.stores):
        streams.engine.mechanism.sync_index(store)
    return report


def check_known(states: Sequence[StreamState], rows: Iterable[int], source: str | None) -> None:
    """Raises InputError, with the sources there are, unless one of the batch rows ``rows`` has this source."""
    if all(states[row].sources.find(source) is None for row in rows):
        names = sorted({repr(entry.name) for state in states for entry in state.sources if entry.is_written})
        raise InputError(f"source must be one of this memory's sources ({', '.join(names) or 'none'}), got {source!r}")


def forget(
    states: list[StreamState],
    stores: Sequence[MemoryStore],
    rows: Iterable[int],
    source: str | None,
    *,
    keep_name: bool = False,
) -> ForgetReport:
    """Remove rows, texts and name of ``source`` from ``states``, in place in the list, and rows from ``stores``.

    Args:
        states: all streams of a memory.
        stores: their stores.
        rows: batch rows to look at.
        source: a name that was given to ``write``.
        keep_name: keep the name, as one of a source of which nothing else is left.

    Raises:
        InputError: none of these streams has this source.
    """
    rows = list(rows)
    check_known(states, rows, source)
    report = held(states, stores, rows, source)
    for row in rows:
        number = states[row].sources.find(source)
        if number is None:
            continue
        state = states[row].without_source(number)
        states[row] = evolve(state, sources=state.sources.having(number, Source(source))) if keep_name else state
        for layer in range(stores[row].layout.layers):
            stores[row].remove(layer, _written_from(stores[row], layer, number))
    return report


def unshare(stores: list[MemoryStore], rows: Iterable[int]) -> None:
    """Let streams that lose rows share their store with no other, in place in the list."""
    for row in rows:
        if sum(store is stores[row] for store in stores) > 1:
            stores[row] = stores[row].fork()


def forgotten_names(state: StreamState) -> list[str | None]:
    """Return the names of sources of which nothing else is left, in order of first writing."""
    return [entry.name for entry in state.sources if not entry.is_written]


def names_to_keep(
    states: Sequence[StreamState], rows: Iterable[int], source: str | None, *, keep_name: bool
) -> list[list[str | None]]:
    """Return for each stream the names that ``forgotten_names`` gives once ``source`` is forgotten in ``rows``."""
    names = [forgotten_names(state) for state in states]
    for row in rows:
        kept = [name for name in names[row] if name != source]
        known = states[row].sources.find(source) is not None
        names[row] = [*kept, source] if keep_name and known else kept
    return names


def with_names(state: StreamState, names: Iterable[str | None]) -> StreamState:
    """Return a stream that also lists these names, of sources of which nothing else is left."""
    sources = state.sources
    for name in names:
        if sources.find(name) is None:
            sources = sources.having(sources.next_number, Source(name))
    return evolve(state, sources=sources)


def without_unused_sources(view: StreamView) -> StreamView:
    """Return a stream without sources of which it has no rows, texts, tail or write ids; names that were kept stay."""
    numbers = view.state.sources.column("number")
    unused = view.state.sources.column("chunks") > 0
    for found in _numbers_in_use(view):
        # The cheapest lists come first: long-term rows are looked at only where a source is still in question.
        if not bool(unused.any()):
            break
        # A number above all others is compared with the last one, which it is not.
        places = torch.searchsorted(numbers, found).clamp(max=len(numbers) - 1)
        unused[places[numbers[places] == found]] = False
    gone = numbers[unused].tolist()
    state = evolve(view.state, sources=view.state.sources.without(gone)) if gone else view.state
    return evolve(view, state=state)


def _numbers_in_use(view: StreamView) -> Iterator[Tensor]:
    """Yield numbers of sources, with repeats: of texts, and of rows list by list, the cheapest first."""
    state = view.state
    texts = () if state.texts is None else state.texts.chunks()
    noted = [*(part.source for part in state.tail), *(record.source for record in state.writes)]
    yield torch.tensor([*noted, *(text.source for text in texts)], dtype=torch.int64)
    for parts in state.row_lists().values():
        for rows in parts:
            yield rows.source.cpu()
    for layer in range(view.store.layout.layers):
        for held in stored(view, layer):
            yield held.sources.cpu()


def held(
    states: Sequence[StreamState], stores: Sequence[StoreView], rows: Iterable[int], source: str | None
) -> ForgetReport:
    """Count what ``forget`` would remove."""
    layers = range(stores[0].layout.layers)
    tokens = chunks = 0
    names = {name: state.lists.get(name, name) for state in states for name in state.row_lists()}  # as reports say
    rows_held = {called: [0] * len(layers) for called in (*names.values(), LONG_TERM)}
    for row in rows:
        state, store = states[row], stores[row]
        number = state.sources.find(source)
        if number is None:
            continue
        tokens += state.sources[number].tokens
        chunks += state.sources[number].chunks
        for name, parts in state.row_lists().items():
            for layer, part in enumerate(parts):
                rows_held[names[name]][layer] += int((part.source == number).sum())
        for layer in layers:
            rows_held[LONG_TERM][layer] += len(_written_from(store, layer, number))
    return ForgetReport(source, tokens, chunks, {name: tuple(counts) for name, counts in rows_held.items()})


def _written_from(store: StoreView, layer: int, number: int) -> Tensor:
    """Return the ids of the rows of a layer that come from one source."""
    found = []
    for piece in store.chunks(layer, "source"):
        own = piece.columns["source"] == number
        found.append(piece.ids[own if piece.live is None else own & piece.live])
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64)
