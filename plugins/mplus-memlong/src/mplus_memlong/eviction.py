"""Which groups leave a bank that is full: by their counters, the older half, as the released code does, or by a policy.

The paper counts how often a group is found, and lets those leave that are found least. The released code has a list for
these counters that nothing fills; what it does is ``"released"``. A string in its evaluation, which is never run, holds
an algorithm with counters, and that is ``"counters"`` here: of the groups in order of age the oldest tenth leaves and
the newest tenth stays, and in between whole classes of equal counters leave, the smallest first, until half of all
groups is gone.

Counters are those of ``MemLongState.recalls``: how many of the groups that are still held found a group when they were
written. So reading a memory changes nothing in it, a counter outlives neither the group that asked nor ``forget``, and
the same text leaves the same memory.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from mplus.errors import ConfigError, MemoryFullError, NotSupported
from mplus.memory.writing.update import WriteContext
from mplus_memlong.state import MemLongState

WAYS = ("counters", "half", "released", "policy")


class Limits(Protocol):
    """The options that say who leaves."""

    @property
    def evict(self) -> str:
        """One of ``WAYS``."""

    @property
    def lower(self) -> int:
        """Percent of the groups, the oldest, that leave whatever their counters are."""

    @property
    def upper(self) -> int:
        """Percent of the groups behind which the newest ones stay whatever their counters are."""


def make_room(
    state: MemLongState, tokens: int, context: WriteContext, limits: Limits, room: int | None = None
) -> tuple[MemLongState, int]:
    """Return the state, and how many rows left ``context.store``, so that ``tokens`` more are within its capacity.

    Args:
        state: of the stream.
        tokens: of a group that is to come.
        context: of the write.
        limits: say who leaves.
        room: bytes that rows and tensors of the stream may take; None: there is no budget.

    Raises:
        MemoryFullError: too much of it is of pinned sources.
        NotSupported: the released eviction, of an odd number of groups.
        ConfigError: the capacity, which a budget gave, is smaller than one group.
    """
    capacity, store = context.capacity, context.store
    before = store.count(0)
    if capacity is None or not _is_over(state, tokens, context, room):
        return state, 0
    if limits.evict == "released":
        return _released(state, capacity, context), before - store.count(0)
    free = torch.ones(state.groups, dtype=torch.bool)
    if context.pinned is not None:
        free = ~torch.isin(state.group_source, context.pinned.to("cpu"))
    if limits.evict != "policy":
        leaving = _least_found(state.counters, limits) if limits.evict == "counters" else _older_half(state.groups)
        state = _without(state, leaving & free, context)
    while _is_over(state, tokens, context, room):
        if not state.groups:
            raise ConfigError(
                f"bytes_budget must have room for a group of {tokens} tokens, its ids and its key, got one for "
                f"{capacity} rows: give more, or lower group_tokens"
            )
        state = _without(state, _next(state, context, limits), context)
    return state, before - store.count(0)


def _is_over(state: MemLongState, tokens: int, context: WriteContext, room: int | None) -> bool:
    """Return whether a stream with ``tokens`` more has more rows than it may, or takes more bytes."""
    store = context.store
    rows = store.count(0) + tokens
    if context.capacity is None or rows > context.capacity:
        return context.capacity is not None
    return room is not None and state.nbytes + rows * store.bytes_per_row > room


def _older_half(groups: int) -> Tensor:
    return torch.arange(groups) < groups - groups // 2


def _least_found(counters: Tensor, limits: Limits) -> Tensor:
    """Return ``[c]`` bool, the groups that leave by their counters ``[c]``."""
    groups = len(counters)
    first, last = groups * limits.lower // 100, groups - groups * (100 - limits.upper) // 100
    place = torch.arange(groups)
    leaving, middle = place < first, (place >= first) & (place < last)
    for counter in counters[middle].unique().tolist():
        if 2 * int(leaving.sum()) >= groups:
            break
        leaving = leaving | (middle & (counters == counter))
    return leaving


def _next(state: MemLongState, context: WriteContext, limits: Limits) -> Tensor:
    """Return ``[c]`` bool, the one group that leaves next: the policy's choice, or the oldest that is not pinned."""
    if limits.evict == "policy":
        row = context.leaving(0, 1)
    else:
        free = context.evictable
        if not free.count(0):
            raise MemoryFullError(
                "a group of a memory must leave, and all of them are of pinned sources: unpin or forget a source, or "
                "give the memory more capacity; the chunk was not written"
            )
        row = free.ids(0)[:1]
    place = torch.searchsorted(context.store.ids(0), row).cpu()
    leaving = torch.zeros(state.groups, dtype=torch.bool)
    leaving[torch.searchsorted(state.group_offset, place, right=True) - 1] = True
    return leaving


def _without(state: MemLongState, leaving: Tensor, context: WriteContext) -> MemLongState:
    """Take groups out of the table, and their rows out of the store."""
    store, places = context.store, state.places(leaving.nonzero().squeeze(1))
    ids = store.ids(0)
    store.remove(0, ids[places.to(ids.device)])
    return state.with_groups(~leaving)


def _released(state: MemLongState, capacity: int, context: WriteContext) -> MemLongState:
    """Keep the newest half of the capacity in tokens, and the newest half of the groups, whether or not these agree."""
    if state.groups % 2:
        raise NotSupported(
            f"the released eviction has no meaning for {state.groups} groups: with an odd number the released code "
            "loses step and fails at the next overflow; use a long_term_tokens of an even number of whole groups, or "
            "evict='half'"
        )
    if context.pinned is not None and len(context.pinned):
        raise MemoryFullError(
            "the released eviction lets the older half of everything leave, pinned sources included: unpin them, or "
            "use evict='half'; the chunk was not written"
        )
    store = context.store
    ids = store.ids(0)
    store.remove(0, ids[: max(len(ids) - capacity // 2, 0)])
    return state.with_groups(torch.arange(state.groups) >= state.groups // 2)
