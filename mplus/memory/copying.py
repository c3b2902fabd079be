"""Copies of a memory: some or all of its streams, here or elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from mplus.errors import MemoryPickleError
from mplus.memory.budget import Budget
from mplus.memory.sharing import each
from mplus.memory.state import StreamState
from mplus.stores.base import MemoryStore

if TYPE_CHECKING:
    from mplus.memory.memory import Memory


def copied(
    memory: Memory,
    rows: Sequence[int],
    copy: Callable[[MemoryStore], MemoryStore],
    change: Callable[[StreamState], StreamState] = lambda state: state,
) -> Memory:
    """Return an ordinary memory of some streams, which goes on independently; nobody changes ``memory`` meanwhile.

    Args:
        memory: where the streams are.
        rows: their batch rows; a row may come several times.
        copy: makes the store of the copy.
        change: makes the state of the copy.
    """
    from mplus.memory.memory import Memory

    states = each([memory.states[row] for row in rows], change)
    stores = each([memory.stores[row] for row in rows], copy)
    generators = [torch.Generator().set_state(memory.generators[row].get_state()) for row in rows]
    budget = memory.budget
    if budget.bytes is not None and stores[0].layout != memory.stores[0].layout:  # rows take another room there
        engine = memory.engine
        budget = Budget.of(budget.bytes, engine.config, engine.mechanism, stores[0], memory.batch_size)
    usage = [notes.fork() for notes in map(memory.usage.__getitem__, rows) if notes is not None]
    return Memory(memory.engine, states, stores, generators, memory.eviction, memory.tokenizer, budget, usage)


def moved(memory: Memory, device: torch.device | None, dtype: torch.dtype | None) -> Memory:
    """Return a copy of a memory on another device or in another dtype; see ``Memory.to``."""
    where = memory.device if device is None else device

    rows = range(memory.batch_size)
    return copied(memory, rows, lambda store: store.to(device, dtype), lambda state: state.to(where, dtype))


def pickle_error() -> MemoryPickleError:
    """What to do instead of pickling a memory."""
    return MemoryPickleError(
        "a memory cannot be pickled (by pickle, torch.save, or to reach another process), since it belongs to one "
        "decoder: use memory.save(path) and mplus.Memory.load(path, model) there, or keep it in a directory and "
        "use mplus.Memory.open(path, model, read_only=True) there"
    )
