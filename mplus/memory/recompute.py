"""Recompute what rows keep besides hidden states, where the weights are others than those that made it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from attrs import evolve

from mplus.config import JsonValue
from mplus.errors import LiveMemoryError, MemoryMismatchError
from mplus.memory.engine import Engine
from mplus.memory.state import StreamState
from mplus.memory.transaction import Streams
from mplus.memory.weights_state import MADE_WITH, WeightsState, weights_of
from mplus.memory.writing.update import check_finite
from mplus.rows import MemoryRows
from mplus.stores.base import MemoryStore, StoreView

PIECE_ROWS = 2**14
"""Rows taken out of a store at a time."""


def refresh_if_stale(
    streams: Streams, now: WeightsState | None = None, *, writing: Sequence[int] | None = None
) -> None:
    """Compute anew what depends on weights that have changed since; every read and write calls it.

    Args:
        streams: of a memory.
        now: what the decoder computes with; None: look.
        writing: the batch rows that are to be written; None: all are to be read.

    Raises:
        MemoryMismatchError: that needs hidden states, and the rows keep keys and values only.
        NonFiniteError: what is computed is NaN or Inf; nothing was changed.
    """
    now = streams.engine.weights() if now is None else now
    if _stale(streams, now, writing):
        with streams.write_lock:
            # Once more under the lock: another thread may have computed the rows meanwhile.
            stale = _stale(streams, now, writing)
            streams.change(lambda states: _refresh(states, streams, stale, now))
    if writing is not None:
        streams.note_weights(now, writing)


def _stale(streams: Streams, now: WeightsState, writing: Sequence[int] | None) -> list[int]:
    """Return the batch rows of which something must be computed anew before they are read, or written.

    Raises:
        MemoryMismatchError: that needs hidden states, and the rows keep keys and values only.
    """
    rows = range(len(streams)) if writing is None else writing
    return [row for row in rows if _is_stale(streams, row, now, writing is not None)]


def _is_stale(streams: Streams, row: int, now: WeightsState, writing: bool) -> bool:
    state, store = streams.states[row], streams.stores[row]
    made, layout = state.weights, store.layout
    # None: an older file did not say what its rows were made with.
    if made is None or made is now or made == now:
        return False
    retrieval = bool(layout.key_size) and bool(made.of_retrieval(now))
    projection = bool(layout.projected_size) and bool(made.of_projection(now))
    if not retrieval and not projection:
        return False
    if not holds_rows(state, store):
        return writing
    if _is_unwritten(state, store, streams.engine):
        return True
    if not layout.keeps_hidden:
        raise unfit(made, now, row, rewritable=state.kept_chunks() is not None or streams.keeps_text)
    return retrieval or writing or not _read_only(streams)


def unfit(
    made: WeightsState, now: WeightsState, row: int, what: str = "this memory", *, rewritable: bool = False
) -> MemoryMismatchError:
    """Return the error for rows kept as keys and values that were made with other weights than those of ``now``."""
    differences = made.of_projection(now) or made.of_retrieval(now)
    if rewritable:
        return MemoryMismatchError(
            f"the keys and values of {what} (batch row {row}) cannot be used: {'; '.join(differences)}: compute them "
            "anew from the ids of what was written, with memory.rewrite(), or go back to what they were made with"
        )
    return MemoryMismatchError(
        f"the keys and values of {what} (batch row {row}) cannot be used: {'; '.join(differences)}: write it again, "
        "go back to what it was made with, or make memories of a decoder whose adapters or weights change with "
        "memory_rows='both' or 'hidden'"
    )


def keeps_chunks(engine: Engine) -> bool:
    """Return whether states of the decoder's memories keep the ids of their rows, so that these can be rewritten."""
    found: type[StreamState] = engine.mechanism.State
    return found.kept_chunks is not StreamState.kept_chunks


def holds_rows(state: StreamState, store: StoreView) -> bool:
    """Return True if a stream has any row."""
    held = any(count for parts in state.counts().values() for count in parts)
    return held or any(map(store.count, range(store.layout.layers)))


def _is_unwritten(state: StreamState, store: MemoryStore, engine: Engine) -> bool:
    """Return True if a stream is as it was when it was new."""
    new = engine.mechanism.new_state(store.layout)
    return not state.sources and state.clock == new.clock and state.counts() == new.counts()


def _read_only(streams: Streams) -> bool:
    """Return True for a memory in a directory that cannot be changed: every read then projects its rows."""
    try:
        streams.check_writable()
    except LiveMemoryError:
        return True
    return False


@torch.no_grad()
def _refresh(states: list[StreamState], streams: Streams, stale: Sequence[int], now: WeightsState) -> None:
    """Compute all rows of the streams ``stale`` anew: in ``states``, in place in the list, and in their stores.

    There they get new ids, and notes on them move on to these. Streams that were never written begin anew.

    Raises:
        NonFiniteError: what is computed is NaN or Inf.
    """
    engine = streams.engine
    streams.fork_access_logs(stale)
    for row in stale:
        state, store, notes = states[row], streams.stores[row], streams.access_logs[row]
        if _is_unwritten(state, store, engine):
            states[row] = evolve(engine.new_state(store.layout), texts=state.texts, weights=now)
            continue
        anew = state.without_computed().changed(lambda rows, name, layer: _refreshed(rows, layer, engine))
        states[row] = evolve(anew, weights=now)
        for layer in range(store.layout.layers):
            times = None if notes is None else notes.times(layer, store.ids(layer))
            # A copy of the ids: the store changes under the loop, and piece by piece all rows get new ids behind the
            # old ones.
            for ids in store.ids(layer).clone().split(PIECE_ROWS):
                rows = _refreshed(store.gather(layer, ids), layer, engine)
                store.remove(layer, ids)
                store.append(layer, rows)
            if notes is not None and times is not None:
                notes.set_times(layer, store.ids(layer), times)


def _refreshed(rows: MemoryRows, layer: int, engine: Engine) -> MemoryRows:
    if not len(rows):
        return rows
    found = engine.refresh(rows, layer)
    for column, what in ((found.key, "the retriever keys"), (found.projected, "keys and values")):
        if column is not None:
            check_finite(column, f"in {what} of layer {layer}")
    return found


def with_weights(
    states: Sequence[StreamState],
    stores: Sequence[StoreView],
    fingerprint: Mapping[str, JsonValue],
    engine: Engine,
    where: str | Path,
) -> list[StreamState]:
    """Return streams read from a file with the weights their rows were made with; an older file does not say it.

    Warns where rows have hidden states and the decoder computes with other adapters now: they are projected anew.

    Raises:
        MemoryMismatchError: the rows are keys and values only, which the decoder would make differently now.
    """
    if MADE_WITH not in fingerprint:
        return list(states)
    made = weights_of(fingerprint, len(states))
    now = engine.weights()
    known = [now]
    if len(set(map(repr, made))) > 1:  # written for batches in which each row has an adapter of its own
        known += [engine.weights([name]) for name in dict.fromkeys(n for one in made for n in one.adapters.names)]
        known.append(engine.weights([]))
    found: list[StreamState] = []
    others: dict[str, list[int]] = {}
    for row, (state, store, weights) in enumerate(zip(states, stores, made, strict=True)):
        projection, retrieval = weights.of_projection(now), weights.of_retrieval(now)
        stale = bool(store.layout.projected_size and projection) or bool(store.layout.key_size and retrieval)
        if not holds_rows(state, store):
            found.append(evolve(state, weights=weights if stale else now))
        elif store.layout.keeps_hidden:
            found.append(evolve(state, weights=weights if stale else now))
            if stale or projection:
                others.setdefault("; ".join(projection or retrieval), []).append(row)
        else:
            fitting: list[WeightsState | None] = [
                one for one in known if not weights.of_projection(one) and not weights.of_retrieval(one)
            ]
            if not fitting and state.kept_chunks() is not None:  # refused when it is used, and can be rewritten
                fitting = [weights]
            if not fitting:
                raise unfit(weights, now, row, str(where))
            found.append(evolve(state, weights=fitting[0]))
    for difference, rows in others.items():
        warnings.warn(
            f"{where} (batch rows {', '.join(map(str, rows))}): {difference}; its rows have hidden states and are "
            "projected anew",
            stacklevel=5,
        )
    return found
