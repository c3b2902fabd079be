"""What rows keep besides hidden states, computed anew from them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import evolve

from mplus.errors import MemoryMismatchError
from mplus.memory.checks import check_finite
from mplus.memory.engine import Engine
from mplus.memory.stream import StreamState
from mplus.rows import MemoryRows
from mplus.stores.base import MemoryStore
from mplus.stores.usage import Usage

PIECE_ROWS = 2**14
"""Rows taken out of a store at a time."""


@torch.no_grad()
def refresh(
    states: list[StreamState], stores: Sequence[MemoryStore], engine: Engine, usage: Sequence[Usage | None]
) -> None:
    """Refresh all rows: in ``states``, in place in the list, and in ``stores``, where they get new ids.

    Notes in ``usage`` move on to these.

    Raises:
        MemoryMismatchError: they have no hidden states.
        NonFiniteError: what is computed is NaN or Inf.
    """
    if not stores[0].layout.keeps_hidden:
        raise MemoryMismatchError(
            "the weights that this memory's keys and values were made with have changed: write it again, or make "
            "memories of a decoder that is still trained with memory_rows='both' or 'hidden'"
        )
    for row, state in enumerate(states):
        stm = tuple(_refreshed(rows, layer, engine) for layer, rows in enumerate(state.stm))
        pending = tuple(_refreshed(rows, layer, engine) for layer, rows in enumerate(state.pending))
        states[row] = evolve(state, stm=stm, pending=pending)
    for store, notes in dict(zip(stores, usage, strict=True)).items():
        for layer in range(store.layout.layers):
            times = None if notes is None else notes.times(layer, store.ids(layer))
            for ids in store.ids(layer).clone().split(PIECE_ROWS):
                rows = _refreshed(store.gather(layer, ids), layer, engine)
                store.remove(layer, ids)
                store.append(layer, rows)
            if notes is not None and times is not None:
                notes.replace(layer, store.ids(layer), times)


def _refreshed(rows: MemoryRows, layer: int, engine: Engine) -> MemoryRows:
    found = engine.refresh(rows, layer)
    for column, what in ((found.key, "the retriever keys"), (found.projected, "keys and values")):
        if column is not None:
            check_finite(column, f"in {what} of layer {layer}")
    return found
