"""The short-term rows that a stream begins with: none, or a checkpoint's pool."""

from __future__ import annotations

import torch
from attrs import evolve
from torch import Tensor

from mplus.mechanisms.root import Columns
from mplus.mechanisms.short_term.state import ShortTermState
from mplus.rows import NO_SOURCE, MemoryRows
from mplus.stores.base import StoreLayout


def empty_rows(layout: StoreLayout) -> MemoryRows:
    """Return no short-term rows; these have a key from the start only where it cannot be made when they leave."""
    return MemoryRows.empty(
        layout.hidden_size if layout.keeps_hidden else 0,
        key_size=0 if layout.keeps_hidden else layout.key_size,
        projected_size=layout.projected_size,
        dtype=layout.dtype,
        device=layout.device,
    )


def first_state(layout: StoreLayout, pool: Tensor | None) -> ShortTermState:
    """Return a fresh stream; the rows of ``pool`` ``[layers, n, d]``, if there is one, have hidden states only."""
    empty = tuple(empty_rows(layout) for _ in range(layout.layers))
    if pool is None:
        hidden = torch.empty(0, layout.hidden_size, dtype=layout.dtype, device=layout.device)
        newest = () if layout.keeps_hidden else (hidden,) * layout.layers
        return ShortTermState(stm=empty, pending=empty, newest=newest)
    n = pool.shape[1]
    births = torch.arange(n, dtype=torch.int64, device=layout.device)
    source = torch.full((n,), NO_SOURCE, dtype=torch.int64, device=layout.device)
    stm = tuple(MemoryRows(rows.to(layout.device, layout.dtype), births, source) for rows in pool.detach())
    return ShortTermState(stm=stm, pending=empty, clock=n)


def completed(state: ShortTermState, layout: StoreLayout, columns: Columns, count: int) -> ShortTermState:
    """Return a fresh stream whose rows have all columns of a layout, and beside them ``count`` newest hidden states.

    Args:
        state: of ``first_state``.
        layout: of short-term rows.
        columns: makes of hidden states what the layout has in their place.
        count: K, rows of a chunk.
    """
    newest = state.newest
    if not newest and not layout.keeps_hidden:
        # Copies: views would keep the hidden states of all rows alive. max: a negative start counts from the end.
        newest = tuple(rows.need_hidden()[max(len(rows) - count, 0) :].clone() for rows in state.stm)
    stm = tuple(_completed(layer, rows, layout, columns) for layer, rows in enumerate(state.stm))
    return evolve(state, stm=stm, newest=newest)


def _completed(layer: int, rows: MemoryRows, layout: StoreLayout, columns: Columns) -> MemoryRows:
    if rows.hidden is None:
        return rows
    if layout.projected_size and rows.projected is None:
        rows = rows.replace(projected=columns.project(layer, rows.hidden[None])[0].to(rows.hidden))
    if not layout.keeps_hidden:
        rows = rows.replace(key=columns.keys(layer, rows.need_hidden()), hidden=None)
    return rows
