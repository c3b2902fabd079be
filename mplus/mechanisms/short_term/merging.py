"""Short-term rows of two streams in one list, with the hidden states that the next write reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import evolve
from torch import Tensor

from mplus.mechanisms.short_term.state import ShortTermState
from mplus.rows import MemoryRows

KNOWN = "known"
"""A column ``[n]`` bool: whether the hidden state of a row, which keeps none, is known for the next write."""


def with_newest(state: ShortTermState) -> tuple[MemoryRows, ...]:
    """Return the short-term rows of each layer; where ``newest`` has hidden states, with these and a column ``KNOWN``.

    The hidden states of other rows are zeros.
    """
    if not state.newest:
        return state.stm
    found = []
    for rows, hidden in zip(state.stm, state.newest, strict=True):
        missing = len(rows) - len(hidden)
        known = torch.arange(len(rows), device=hidden.device) >= missing
        padded = torch.cat([hidden.new_zeros(missing, hidden.shape[1]), hidden])
        found.append(evolve(rows, hidden=padded, extra={**rows.extra, KNOWN: known}))
    return tuple(found)


def newest_in(stm: Sequence[MemoryRows], count: int) -> tuple[Tensor, ...]:
    """Return per layer ``[c, d]``, ``count`` hidden states of the newest rows ``with_newest``, if so many are known."""
    found = []
    for rows in stm:
        unknown = (~rows.extra[KNOWN]).nonzero()
        first = max(int(unknown[-1]) + 1 if len(unknown) else 0, len(rows) - count)
        found.append(rows.need_hidden()[first:].clone())
    return tuple(found)


def without_newest(layers: Sequence[MemoryRows]) -> tuple[MemoryRows, ...]:
    """Return rows as they were before ``with_newest``."""
    return tuple(
        evolve(rows, hidden=None, extra={name: column for name, column in rows.extra.items() if name != KNOWN})
        if KNOWN in rows.extra
        else rows
        for rows in layers
    )
