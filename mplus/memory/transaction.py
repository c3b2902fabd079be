"""The streams of one memory, and the one way to change them: wholly or not at all."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeAlias, TypeVar

import torch
from attrs import define, evolve, field
from torch import Tensor

from mplus.errors import LiveMemoryError
from mplus.eviction.base import EvictionPolicy
from mplus.memory.budget import Budget
from mplus.memory.engine import Engine
from mplus.memory.sources.clock import Clock, read_clock, utc_now
from mplus.memory.state import StreamState, StreamView
from mplus.memory.weights_state import WeightsState
from mplus.stores.access_log import AccessLog
from mplus.stores.base import MemoryStore, StoreView
from mplus.stores.disk.locks import ProcessLock
from mplus.stores.sharing import distinct, each, unshared

T = TypeVar("T")

KeptPositions = Mapping[int, Mapping[str, Sequence[Tensor]]]
"""By batch row, what ``Absorbed.stayed`` says of a write: positions of rows that stayed, per list and layer."""


@define(eq=False)
class Transaction:
    """A change that is under way, and what the streams were before it.

    Attributes:
        stores, generators, access_logs: the ones there were.
        snapshots, draws: states of these stores and generators.
        after: the states that the change makes; None: it has not come that far.
        thread: id of the thread that makes the change.
        aborted: whether an exception has ended it, and it is to be resolved.
    """

    stores: tuple[MemoryStore, ...]
    generators: tuple[torch.Generator, ...]
    access_logs: tuple[AccessLog | None, ...]
    snapshots: Sequence[StoreView]
    draws: Sequence[Tensor]
    after: tuple[StreamState, ...] | None = None
    thread: int = field(factory=threading.get_ident)
    aborted: bool = False


Sync = Callable[[Callable[[], None]], None]
"""``sync(work)``: calls ``work``, which syncs a record, now or together with others, and raises what that raises."""


class ChangeToken:
    """Stands for one change of a memory, where no list of new states does."""


Token: TypeAlias = ChangeToken | Sequence[StreamState]
"""The object that a change makes, by which it is known afterwards."""


class Persistence:
    """Where the changes of a memory are kept besides the memory itself: nowhere, unless a subclass overrides all this.

    ``Streams`` calls it with its locks held. A change calls ``begin``, then ``tidy`` and ``commit`` once it has made
    new states; where an exception ends it, ``committed`` says whether it happened all the same.

    Attributes:
        directory: the files of the memory (``mplus.memory.directory.directory.Directory``); None: there are none.
        journal_bytes: a journal longer than this is replaced by a checkpoint; None: there is none.
    """

    directory: Any = None
    journal_bytes: int | None = None

    def check_writable(self) -> None:
        """Raise LiveMemoryError where the memory cannot be changed."""

    def begin(self, streams: Streams) -> None:
        """Prepare for a change of ``streams``, which are as before it. Raises as ``check_writable``."""

    def tidy(self, states: list[StreamState], streams: Streams, kept: KeptPositions | None) -> None:
        """Replace, in the list, states that a change has made by the ones to keep.

        Args:
            states: of all streams after the change.
            streams: their stores are as after the change.
            kept: of a write, the positions of rows that stayed; None: it is another change.
        """

    def commit(
        self, after: tuple[StreamState, ...], streams: Streams, kept: KeptPositions | None, sync: Sync | None = None
    ) -> None:
        """Put a change on disk; it shows in memory after that. ``streams`` has the states from before it.

        ``sync``: called where a record is to be synced, if there is one; None: it is synced at once.
        """

    def checkpoint(self, token: Token, states: Sequence[StreamState], streams: Streams) -> None:
        """Put ``states`` on disk as a whole, with the stores and generators of ``streams``, as the change ``token``.

        Raises LiveMemoryError where there is no directory.
        """
        raise LiveMemoryError(
            "a checkpoint needs a memory that lives in a directory (Memory.open), and this one is in memory only: "
            "use memory.save(path)"
        )

    def committed(self, token: Token) -> bool:
        """Resolve a commit or checkpoint that an exception has ended.

        Returns:
            Whether the change that makes ``token`` is on disk for good; else it is not there at all.
        """
        return False

    def after_write(self, streams: Streams) -> None:
        """Do what is due once a chunk has been written; called without the state lock."""

    def check_removed(self) -> None:
        """Raise MemoryFileError where a file may still hold what was removed."""

    @property
    def is_open(self) -> bool:
        """True if there are files, and what is changed is put into them."""
        return False

    @property
    def has_journal(self) -> bool:
        """True if something was written since the last checkpoint, and a checkpoint can be."""
        return False

    def close(self) -> None:
        """Release files and locks; idempotent."""


class Streams:
    """All streams of one memory with what they share: decoder, eviction policy, budget, locks and persistence.

    Looking at it is safe in any thread. Changes are made by ``change``, one at a time.

    Attributes:
        engine: the wrapped decoder they belong to.
        eviction: chooses which long-term rows leave at capacity.
        budget: says what that is.
        persistence: where changes are kept.
        generators: one ``torch.Generator`` (CPU) per stream, for the mechanism's draws.
        access_logs: notes on what was retrieved from each stream, where the eviction policy goes by them.
        clock: says when sources are written, and which of them have expired.
        version: grows with every change.
    """

    def __init__(
        self,
        engine: Engine,
        states: Sequence[StreamState],
        stores: Sequence[MemoryStore],
        generators: Sequence[torch.Generator],
        eviction: EvictionPolicy,
        budget: Budget | None = None,
        access_logs: Sequence[AccessLog] = (),
        persistence: Persistence | None = None,
        clock: Clock | None = None,
    ) -> None:
        """Make streams of their parts.

        ``budget`` None: as many long-term rows as the config says. ``persistence`` None: in memory only. ``clock``
        None: that of the computer, in UTC.
        """
        self.engine = engine
        self.eviction = eviction
        self.budget = Budget(engine.config.long_term_tokens) if budget is None else budget
        self.persistence = Persistence() if persistence is None else persistence
        self.generators = tuple(generators)
        self.clock = utc_now if clock is None else clock
        read_clock(self.clock)  # a clock without a timezone is refused now, not by the first write
        self.version = 0
        now = engine.weights() if any(state.weights is None for state in states) else None
        self._states = tuple(state if state.weights else evolve(state, weights=now) for state in states)
        self._stores = tuple(stores)
        if self.budget.bytes is not None and self.budget.capacity is not None:
            for store in distinct(self._stores):
                store.set_capacity(self.budget.capacity)
        self.access_logs: tuple[AccessLog | None, ...] = (None,) * len(self._states)
        if eviction.needs_access_log:
            self.access_logs = tuple(access_logs) or tuple(AccessLog() for _ in self._states)
        self._transaction: Transaction | None = None
        self._state_locks, self._write_locks = ProcessLock(threading.RLock), ProcessLock(threading.RLock)

    # ------------------------------------------------------------------ looking

    def __len__(self) -> int:
        return len(self._states)

    @property
    def states(self) -> tuple[StreamState, ...]:
        """The present state of each stream (immutable)."""
        self._enter_child()
        return self._states

    @property
    def stores(self) -> tuple[MemoryStore, ...]:
        """The long-term store of each stream; changed only in a change."""
        self._enter_child()
        return self._stores

    @property
    def device(self) -> torch.device:
        """Where the rows are kept."""
        return self._stores[0].layout.device

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the rows."""
        return self._stores[0].layout.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all rows (reserved capacity included); what streams share, once."""
        return sum(s.nbytes for s in distinct(self.states)) + sum(s.nbytes for s in distinct(self.stores))

    @property
    def keeps_text(self) -> bool:
        """True if the ids of all that was written are kept."""
        return all(state.texts is not None for state in self._states)

    def draws(self) -> list[Tensor]:
        """Return the state of each stream's generator."""
        return [generator.get_state() for generator in self.generators]

    def versioned_snapshot(self) -> tuple[int, tuple[StreamView, ...]]:
        """Return ``version`` and an immutable view of every stream, of the same instant."""
        with self.state_lock:
            self.resolve_aborted()
            views = map(StreamView, self._states, each(self._stores, lambda store: store.snapshot()), self.access_logs)
            return self.version, tuple(views)

    @property
    def write_lock(self) -> AbstractContextManager[bool]:
        """The lock that a thread holds while it writes; taken before ``state_lock``."""
        return self._write_locks.here()

    @property
    def state_lock(self) -> AbstractContextManager[bool]:
        """The lock that a thread holds while it makes a change, or looks at more than one attribute."""
        self._enter_child()
        return self._state_locks.here()

    @property
    def is_changed_elsewhere(self) -> bool:
        """True while another thread writes."""
        # A lock that this thread holds itself can be taken once more: only that of another thread is not free.
        lock: Any = self._write_locks.here()
        free: bool = lock.acquire(blocking=False)
        if free:
            lock.release()
        return not free

    # ------------------------------------------------------------------ changing

    def check_writable(self) -> None:
        """Raise LiveMemoryError where nothing can be written."""
        with self.state_lock:
            self.resolve_aborted()
            self.persistence.check_writable()

    def change(
        self,
        change: Callable[[list[StreamState]], T],
        kept: KeptPositions | None = None,
        sync: Sync | None = None,
    ) -> T:
        """Let ``change`` alter a list of the states, and the stores; on any exception all is as before.

        Args:
            change: called with a list of the states.
            kept: of a write, filled by ``change`` with the positions of rows that stayed; None: it is another change.
            sync: as for ``Persistence.commit``.

        Raises:
            LiveMemoryError, MemoryFileError: it cannot be kept; besides what ``change`` raises.
        """
        # No context manager of our own: an interrupt on the way into its exit would leave the change half done.
        with self.state_lock:
            self._resolve()  # an interrupt may have struck while the last change was being resolved
            self.persistence.begin(self)
            self._stores = unshared(self._stores)  # copies of a row share a store until now
            states, transaction = list(self._states), self._begin()
            try:
                result = change(states)
                self.persistence.tidy(states, self, kept)
                transaction.after = tuple(states)  # the token by which ``committed`` knows this change
                self.persistence.commit(transaction.after, self, kept, sync)
                self._states, self.version = transaction.after, self.version + 1
            except BaseException:
                transaction.aborted = True
                self._resolve()
                raise
            self._transaction = None
            return result

    def adopt(self, other: Streams) -> None:
        """Take over the stores, generators and notes of ``other``, which is not used any more; part of a change."""
        self._stores, self.generators, self.access_logs = unshared(other.stores), other.generators, other.access_logs

    def fork_access_logs(self, rows: Sequence[int]) -> None:
        """Replace the notes on some streams by copies, so that there is a way back; part of a change."""
        self.access_logs = tuple(
            notes.fork() if notes is not None and row in rows else notes for row, notes in enumerate(self.access_logs)
        )

    def note_weights(self, now: WeightsState, rows: Sequence[int]) -> None:
        """Note what some streams are written with next: rows with hidden states depend on what wrote them last.

        Nothing that a read sees changes.
        """
        with self.state_lock:
            states = [
                evolve(s, weights=now) if n in rows and s.weights != now else s for n, s in enumerate(self._states)
            ]
            self._states = tuple(states)

    def checkpoint(self) -> None:
        """Write a checkpoint; on any exception all is as before. Raises MemoryFileError and LiveMemoryError."""
        self.check_writable()
        with self.write_lock, self.state_lock:
            token = ChangeToken()  # not the states: these are what the last write began
            try:
                states = list(self._states)
                self.persistence.tidy(states, self, None)
                self.persistence.checkpoint(token, states, self)
                self._states = tuple(states)
            except BaseException:
                self.persistence.committed(token)
                raise

    def close(self) -> None:
        """Write a checkpoint if anything was written since the last one, and release the files; idempotent."""
        with self.write_lock:
            try:
                with self.state_lock:
                    self.resolve_aborted()
                if self.persistence.has_journal:
                    self.checkpoint()
            finally:
                self.persistence.close()

    def resolve_aborted(self) -> None:
        """Resolve what a further interrupt kept from being resolved; a change that is under way is let be."""
        transaction = self._transaction
        if transaction is not None and transaction.aborted:
            self._resolve()

    def _begin(self) -> Transaction:
        snapshots = [store.snapshot() for store in self._stores]
        self._transaction = Transaction(self._stores, self.generators, self.access_logs, snapshots, self.draws())
        return self._transaction

    def _resolve(self) -> None:
        """End a change that an exception has cut off: it has come to be, or all is as before it."""
        transaction = self._transaction
        if transaction is not None and self._states is not transaction.after:  # else it had come to be already
            if transaction.after is not None and self.persistence.committed(transaction.after):
                self._states, self.version = transaction.after, self.version + 1
            else:
                self._roll_back(transaction)
        self._transaction = None

    def _roll_back(self, transaction: Transaction) -> None:
        self._stores, self.generators, self.access_logs = (
            transaction.stores,
            transaction.generators,
            transaction.access_logs,
        )
        for store, snapshot in zip(transaction.stores, transaction.snapshots, strict=True):
            store.restore(snapshot)
        for generator, state in zip(transaction.generators, transaction.draws, strict=True):
            generator.set_state(state)

    def _enter_child(self) -> None:
        """In a child that was just forked: undo what another thread of the parent had not finished."""
        if self._state_locks.is_new:
            with self._state_locks.here():
                transaction = self._transaction
                if transaction is not None and transaction.thread != threading.get_ident():
                    if self._states is not transaction.after:
                        self._roll_back(transaction)
                    self._transaction = None
