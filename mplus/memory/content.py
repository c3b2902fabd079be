"""What a memory holds, and how to look at it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from attrs import evolve

from mplus.eviction.base import EvictionPolicy
from mplus.memory.budget import Budget
from mplus.memory.checks import check_row
from mplus.memory.engine import Engine
from mplus.memory.report import SourceInfo
from mplus.memory.sharing import distinct, each
from mplus.memory.sources.forget import forgotten_names
from mplus.memory.sources.listing import sources_of
from mplus.memory.state import LONG_TERM, StreamState, StreamView
from mplus.stores.access_log import AccessLog
from mplus.stores.base import MemoryStore
from mplus.stores.disk.process_lock import ProcessLock


class MemoryContent:
    """The part of ``Memory`` that changes nothing.

    Attributes:
        engine: the wrapped decoder this memory belongs to.
        tokenizer: turns text into ids for ``write``; may be None.
        generators: one ``torch.Generator`` (CPU) per stream; draws which rows leave the STM.
        eviction: chooses which long-term rows leave at capacity.
        budget: says what that is.
    """

    def __init__(
        self,
        engine: Engine,
        states: Sequence[StreamState],
        stores: Sequence[MemoryStore],
        generators: Sequence[torch.Generator],
        eviction: EvictionPolicy,
        tokenizer: Any = None,
        budget: Budget | None = None,
        usage: Sequence[AccessLog] = (),
    ) -> None:
        """``budget`` None: as many long-term rows as the config says. ``usage``: notes on each stream, if there are."""
        self.engine = engine
        self.tokenizer = tokenizer
        self.generators = tuple(generators)
        self.eviction = eviction
        self.budget = Budget(engine.config.long_term_tokens) if budget is None else budget
        now = engine.weights() if any(state.weights is None for state in states) else None
        self._states = tuple(state if state.weights else evolve(state, weights=now) for state in states)
        self._stores = tuple(stores)
        if self.budget.bytes is not None and self.budget.capacity is not None:
            for store in distinct(self._stores):
                store.set_capacity(self.budget.capacity)
        self._usage: tuple[AccessLog | None, ...] = (None,) * len(self._states)
        if eviction.needs_access_log:
            self._usage = tuple(usage) or tuple(AccessLog() for _ in self._states)
        self._version = 0
        self._begun: Any = None
        self._state_locks, self._write_locks = ProcessLock(threading.RLock), ProcessLock(threading.RLock)

    @property
    def batch_size(self) -> int:
        """Number of independent streams B."""
        return len(self._states)

    @property
    def version(self) -> int:
        """Grows with every change; a key/value cache made under one version does not fit another."""
        return self._version

    @property
    def states(self) -> tuple[StreamState, ...]:
        """The present state of each stream (immutable)."""
        self._arrive()
        return self._states

    @property
    def stores(self) -> tuple[MemoryStore, ...]:
        """The long-term store of each stream; changed only through the memory."""
        self._arrive()
        return self._stores

    @property
    def usage(self) -> tuple[AccessLog | None, ...]:
        """Notes on what was retrieved from each stream, where the eviction policy goes by them."""
        return self._usage

    @property
    def device(self) -> torch.device:
        """Where the rows are kept."""
        return self._stores[0].layout.device

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the rows."""
        return self._stores[0].layout.dtype

    @property
    def write_lock(self) -> threading.RLock:
        """Held by whoever writes."""
        lock: threading.RLock = self._write_locks.here()
        return lock

    @property
    def _write_lock(self) -> threading.RLock:
        return self.write_lock

    @property
    def _state_lock(self) -> threading.RLock:
        """Held by whoever changes the memory, or looks at all of it."""
        self._arrive()
        lock: threading.RLock = self._state_locks.here()
        return lock

    def _arrive(self) -> None:
        """In a child that was just forked: undo what another thread of the parent had not finished."""
        if self._state_locks.is_new:
            with self._state_locks.here():
                self._leave_to_parent()

    def _leave_to_parent(self) -> None:
        """See ``Keeping``."""

    def _settle_rest(self) -> None:
        """See ``Keeping``."""

    @property
    def nbytes(self) -> int:
        """Bytes of all rows, short-term, pending and long-term (reserved capacity included); what is shared, once."""
        return sum(s.nbytes for s in distinct(self._states)) + sum(s.nbytes for s in distinct(self._stores))

    @property
    def capacity(self) -> int | None:
        """Long-term rows that each layer of a stream may hold after a write; None: no limit."""
        return self.budget.capacity

    @property
    def text_capacity(self) -> int | None:
        """Text tokens whose rows the LTM of a stream has room for, if written in full chunks; None: no limit."""
        return self.budget.text_tokens(self.engine.config)

    @property
    def keeps_text(self) -> bool:
        """Whether the ids of all that was written are kept, for ``forget(mode="rebuild")``."""
        return all(state.texts is not None for state in self._states)

    def snapshot(self) -> tuple[StreamView, ...]:
        """An immutable view of every stream, taken at one instant."""
        return self.versioned_snapshot()[1]

    def versioned_snapshot(self) -> tuple[int, tuple[StreamView, ...]]:
        """``version`` and ``snapshot`` of the same instant."""
        with self._state_lock:
            self._settle_rest()
            views = map(StreamView, self._states, each(self._stores, lambda store: store.snapshot()), self._usage)
            return self._version, tuple(views)

    def sources(self, row: int = 0) -> list[SourceInfo]:
        """The sources of batch row ``row``, in order of first writing, with the rows still held of each.

        One of which no row, text or tail is held any more is dropped by the next ``save`` (from what is saved) or
        checkpoint.

        Raises:
            InputError: there is no such batch row.
        """
        row = check_row(row, self.batch_size)
        return sources_of(self.snapshot()[row], self.engine.config.memory_tokens_per_chunk)

    def forgotten(self, row: int = 0) -> list[str | None]:
        """Names of sources of batch row ``row`` that ``forget(keep_name=True)`` left nothing of but the name.

        A name that is written again is no longer among them.

        Raises:
            InputError: there is no such batch row.
        """
        check_row(row, self.batch_size)
        return forgotten_names(self._states[row])

    def __repr__(self) -> str:
        rows = ", ".join(map(_described, self._states[:4], self._stores[:4]))
        more = ", ..." if self.batch_size > 4 else ""
        limit = "" if self.capacity is None else f", at most {self.capacity} LTM ({self.text_capacity} text tokens)"
        kind, size = type(self).__name__, f"{self.nbytes / 2**20:.1f} MiB"
        return f"{kind}(batch_size={self.batch_size}, rows per layer: {rows}{more}{limit}, {size})"


def _described(state: StreamState, store: MemoryStore) -> str:
    """Return how many rows the first layer has, by what reports call them."""
    counts = {state.lists.get(name, name): parts[0] for name, parts in state.counts().items() if parts}
    counts[LONG_TERM] = store.count(0)
    return f"[{', '.join(f'{count} {name}' for name, count in counts.items())}]"
