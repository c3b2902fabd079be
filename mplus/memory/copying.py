"""Copies of a memory: some or all of its streams, here or elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from mplus.errors import MemoryPickleError
from mplus.memory.budget import Budget
from mplus.memory.sharing import each
from mplus.memory.state import StreamState
from mplus.memory.transaction import Streams
from mplus.stores.base import MemoryStore


def copied(
    streams: Streams,
    rows: Sequence[int],
    copy: Callable[[MemoryStore], MemoryStore] = lambda store: store.fork(),
    change: Callable[[StreamState], StreamState] = lambda state: state,
) -> Streams:
    """Return some of the streams as those of another memory, kept in memory only, which goes on independently.

    Args:
        streams: where they are.
        rows: their batch rows; a row may come several times.
        copy: makes the store of the copy.
        change: makes the state of the copy.
    """
    with streams.state_lock:
        streams.resolve_aborted()
        states = each([streams.states[row] for row in rows], change)
        stores = each([streams.stores[row] for row in rows], copy)
        generators = [torch.Generator().set_state(streams.generators[row].get_state()) for row in rows]
        usage = [notes.fork() for notes in map(streams.usage.__getitem__, rows) if notes is not None]
    engine, budget = streams.engine, streams.budget
    if budget.bytes is not None and stores[0].layout != streams.stores[0].layout:  # rows take another room there
        budget = Budget.of(budget.bytes, engine.config, engine.mechanism, stores[0], len(streams))
    return Streams(engine, states, stores, generators, streams.eviction, budget, usage)


def moved(streams: Streams, device: torch.device | None, dtype: torch.dtype | None) -> Streams:
    """Return a copy of all streams on another device or in another dtype; see ``Memory.to``."""
    where = streams.device if device is None else device
    rows = range(len(streams))
    return copied(streams, rows, lambda store: store.to(device, dtype), lambda state: state.to(where, dtype))


def pickle_error() -> MemoryPickleError:
    """Return the error that says what to do instead of pickling a memory."""
    return MemoryPickleError(
        "a memory cannot be pickled (by pickle, torch.save, or to reach another process), since it belongs to one "
        "decoder: use memory.save(path) and mplus.Memory.load(path, model) there, or keep it in a directory and "
        "use mplus.Memory.open(path, model, read_only=True) there"
    )
