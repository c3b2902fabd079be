"""Memory: what one conversation, user or book has left in a decoder; one stream per batch row."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from attrs import evolve
from torch import Tensor

from mplus.config import Component
from mplus.memory.checks import check_chunk, check_dtype, check_row, check_rows, check_vocabulary
from mplus.memory.chunking import to_names
from mplus.memory.engine import Engine, engine_of
from mplus.memory.forgetting import forget
from mplus.memory.refreshing import refresh
from mplus.memory.report import SourceInfo, WriteReport
from mplus.memory.sharing import distinct, each, unshared
from mplus.memory.stream import StreamState, StreamView
from mplus.memory.write_context import WriteContext
from mplus.memory.writing import Made, Stream, keys, write_streams, write_together
from mplus.rows import MemoryRows
from mplus.stores.base import MemoryStore
from mplus.stores.eviction import EvictionPolicy

T = TypeVar("T")


class Memory:
    """Short-term rows, long-term rows and where they came from; explicit state that is passed to a decoder.

    Made by ``model.new_memory`` or ``Memory.load``. Reading never changes it. A read works on a snapshot, so a write
    in another thread does not disturb it; writes of one memory are serialised.

    Attributes:
        engine: the wrapped decoder this memory belongs to.
        tokenizer: turns text into ids for ``write``; may be None.
        generators: one ``torch.Generator`` (CPU) per stream; draws which rows leave the STM.
        eviction: chooses which long-term rows leave at capacity.
    """

    def __init__(
        self,
        engine: Engine,
        states: Sequence[StreamState],
        stores: Sequence[MemoryStore],
        generators: Sequence[torch.Generator],
        eviction: EvictionPolicy,
        tokenizer: Any = None,
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.generators = tuple(generators)
        self.eviction = eviction
        self._states = tuple(states)
        self._stores = tuple(stores)
        self._version = 0
        self._weights = engine.weights_digest()
        self._state_lock = threading.RLock()
        self._write_lock = threading.RLock()

    # ------------------------------------------------------------------ what it holds

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
        return self._states

    @property
    def stores(self) -> tuple[MemoryStore, ...]:
        """The long-term store of each stream; changed only through the memory."""
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
    def write_lock(self) -> threading.RLock:
        """Held by whoever writes."""
        return self._write_lock

    @property
    def nbytes(self) -> int:
        """Bytes of all rows, short-term, pending and long-term (reserved capacity included); what is shared, once."""
        return sum(s.nbytes for s in distinct(self._states)) + sum(s.nbytes for s in distinct(self._stores))

    def snapshot(self) -> tuple[StreamView, ...]:
        """An immutable view of every stream, taken at one instant."""
        return self.versioned_snapshot()[1]

    def versioned_snapshot(self) -> tuple[int, tuple[StreamView, ...]]:
        """``version`` and ``snapshot`` of the same instant."""
        with self._state_lock:
            views = map(StreamView, self._states, each(self._stores, lambda store: store.snapshot()))
            return self._version, tuple(views)

    def sources(self, row: int = 0) -> list[SourceInfo]:
        """The sources of batch row ``row``, in order of first writing, with the rows still held of each.

        Raises:
            InputError: there is no such batch row.
        """
        check_row(row, self.batch_size)
        view = self.snapshot()[row]
        stored = [view.store.column(layer, "source") for layer in range(view.store.layout.layers)]
        places = (
            [rows.source for rows in view.state.stm],
            [rows.source for rows in view.state.pending],
            [column for column in stored if column is not None],
        )
        return [
            SourceInfo(
                source.name,
                source.tokens,
                source.chunks,
                *(sum(int((column == number).sum()) for column in columns) / len(columns) for columns in places),
            )
            for number, source in enumerate(view.state.sources)
            if source.chunks
        ]

    def __repr__(self) -> str:
        rows = ", ".join(
            f"[{len(state.stm[0])} STM, {len(state.pending[0])} pending, {store.count(0)} LTM]"
            for state, store in zip(self._states[:4], self._stores[:4], strict=True)
        )
        more = ", ..." if self.batch_size > 4 else ""
        return f"Memory(batch_size={self.batch_size}, rows per layer: {rows}{more}, {self.nbytes / 2**20:.1f} MiB)"

    # ------------------------------------------------------------------ writing

    def write(
        self, data: Any, source: str | Sequence[str | None] | None = None, *, progress: bool | None = None
    ) -> WriteReport:
        """Read text into memory, chunk by chunk.

        Args:
            data: a text; ids ``[n]`` or ``[B, n]``; or a list with a text, ids or None (skip) per batch row.
            source: name that ``sources``, ``forget`` and retrieval reports use; one, or one per batch row.
            progress: show a progress bar; None: for long writes in a terminal.

        Returns:
            What was written.

        Raises:
            InputError: nothing to write, wrong batch size, ids outside the vocabulary, text too short; checked before
                anything is written.
            MemoryMismatchError: the decoder's dtype is not that of the memory.
            NonFiniteError: the decoder gave NaN or Inf for a chunk; the chunks before it are kept, it is not.

        Whatever ends a write early, an interrupt included, leaves the chunks written before it and nothing else.
        """
        return write_together([self], [data], [source], progress=progress)[0]

    def write_chunk(self, ids: Tensor, source: str | None = None) -> WriteReport:
        """Write one chunk ``[B, n]`` to every stream in one pass, without splitting.

        Raises:
            InputError: shape, vocabulary, or n outside ``min_chunk_tokens`` .. ``chunk_tokens``.
            MemoryMismatchError, NonFiniteError: as ``write``; nothing was changed.
        """
        begun = time.perf_counter()
        config = self.engine.config
        check_chunk(ids, self.batch_size, config.min_chunk_tokens, config.chunk_tokens)
        check_vocabulary(ids, self.engine.vocab_size)
        names = to_names(source, self.batch_size)
        check_dtype(self.dtype, self.engine.layout.dtype)
        self.keep_up()
        report = WriteReport.nothing(self.batch_size)
        with self._write_lock:
            write_streams([Stream(self, row, [ids[row]], names[row], report) for row in range(self.batch_size)])
        return evolve(report, seconds=time.perf_counter() - begun)

    def take_in(self, streams: Sequence[Stream], made: Sequence[Made], tokens: int) -> None:
        """Let streams of this memory take in the rows made of one chunk each; all or nothing. Part of a write."""

        def absorb(states: list[StreamState]) -> None:
            for stream, rows in zip(streams, made, strict=True):
                row, report = stream.row, stream.report
                state, number = states[row].with_source(stream.name, tokens)
                context = self._context(row, rows.projected)
                absorbed = self.engine.mechanism.absorb(state, rows.hidden, number, context)
                states[row] = absorbed.state
                report.tokens[row] += tokens
                report.chunks[row] += 1
                report.dropped_rows[row] += absorbed.dropped
                report.evicted_rows[row] += absorbed.evicted

        self._change(absorb)

    def _context(self, row: int, projected: Sequence[Tensor]) -> WriteContext:
        generator = self.generators[row]
        return WriteContext(
            store=self._stores[row],
            eviction=self.eviction,
            draw=lambda n: torch.randperm(n, generator=generator),
            keys=lambda layer, hidden: keys(self.engine, layer, hidden),
            projected=projected,
        )

    def _change(self, change: Callable[[list[StreamState]], T]) -> T:
        """Let ``change`` alter a list of the states, and the stores; on any exception all is as before."""
        # No context manager of our own: an interrupt on the way into its exit would leave the change half done.
        with self._state_lock:
            self._stores = unshared(self._stores)
            before = [store.snapshot() for store in self._stores]
            draws = [generator.get_state() for generator in self.generators]
            states, after = list(self._states), None
            try:
                result = change(states)
                after = tuple(states)
                self._states, self._version = after, self._version + 1
            except BaseException:
                if self._states is not after:
                    for store, snapshot in zip(self._stores, before, strict=True):
                        store.restore(snapshot)
                    for generator, state in zip(self.generators, draws, strict=True):
                        generator.set_state(state)
                raise
            return result

    def keep_up(self) -> None:
        """Compute anew what depends on weights that have changed since; called before every read and write.

        Raises:
            MemoryMismatchError: that needs hidden states, and this memory keeps keys and values only.
        """
        digest = self.engine.weights_digest()
        if digest != self._weights:
            with self._write_lock:
                self._change(lambda states: refresh(states, self._stores, self.engine))
                self._weights = digest

    # ------------------------------------------------------------------ the rest of its life

    def forget(self, source: str | None, row: int | None = None) -> int:
        """Remove every row written from ``source`` (in batch row ``row``, or in all).

        The STM grows back afterwards. Rows written *later* may have taken something over from the rows removed, since
        a write reads the newest rows; forks and saved copies are other memories. Both stay. Where only the newest rows
        have hidden states, and these are removed, the next write reads fewer.

        Returns:
            Rows removed, summed over layers and batch rows.

        Raises:
            InputError: no stream has this source (the message lists the ones there are), or there is no such batch row.
        """
        if row is not None:
            check_row(row, self.batch_size)
        rows = range(self.batch_size) if row is None else [row]
        with self._write_lock:
            return self._change(lambda states: forget(states, self._stores, rows, source))

    def reset(self) -> None:
        """Back to a new memory; the generators go on from where they are."""

        def clear(states: list[StreamState]) -> None:
            for row, store in enumerate(self._stores):
                states[row] = self.engine.new_state(store.layout)
                for layer in range(store.layout.layers):
                    store.remove(layer, store.ids(layer))

        with self._write_lock:
            self._change(clear)

    def fork(self) -> Memory:
        """An independent memory with the same content and the same future draws."""
        with self._state_lock:
            return self._copy(range(self.batch_size), lambda store: store.fork())

    def select(self, rows: Sequence[int]) -> Memory:
        """An independent memory of these batch rows, in this order; a row may come several times.

        Many questions to one memory are read in a batch by ``memory.select([0] * questions)``. Copies of a row share
        everything until they are written, and are retrieved from together; each goes on as the row itself would.

        Raises:
            InputError: no rows, or there is no such batch row.
        """
        check_rows(rows, self.batch_size)
        with self._state_lock:
            return self._copy(rows, lambda store: store.fork())

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Memory:
        """A memory with the same content on another device or in another dtype (an independent copy)."""

        def move(rows: Sequence[MemoryRows]) -> tuple[MemoryRows, ...]:
            return tuple(part.to(device if device is not None else self.device, dtype) for part in rows)

        def moved(state: StreamState) -> StreamState:
            newest = tuple(hidden.to(self.device if device is None else device, dtype) for hidden in state.newest)
            return evolve(state, stm=move(state.stm), pending=move(state.pending), newest=newest)

        with self._state_lock:
            return self._copy(range(self.batch_size), lambda store: store.to(device, dtype), moved)

    def _copy(
        self,
        rows: Sequence[int],
        copy: Callable[[MemoryStore], MemoryStore],
        change: Callable[[StreamState], StreamState] = lambda state: state,
    ) -> Memory:
        states, stores = each([self._states[i] for i in rows], change), each([self._stores[i] for i in rows], copy)
        twins = [torch.Generator().set_state(self.generators[row].get_state()) for row in rows]
        copied = Memory(self.engine, states, stores, twins, self.eviction, self.tokenizer)
        copied._weights = self._weights
        return copied

    def save(self, path: str | Path) -> None:
        """Write a folder with a JSON manifest and safetensors; an older save there stays whole until this one is.

        Writing goes on meanwhile; what is saved is the memory at the call.

        Raises:
            MemoryFileError: ``path`` cannot be written, or holds something that is not a memory.
        """
        from mplus.memory.files import save

        with self._state_lock:
            views = self.snapshot()
            draws = [generator.get_state() for generator in self.generators]
        save(path, views, draws, self.engine, self.eviction)

    @staticmethod
    def load(
        path: str | Path,
        model: Any,
        *,
        tokenizer: Any = None,
        store: Any = None,
        eviction: Any = None,
        device: torch.device | str | None = None,
    ) -> Memory:
        """Read a saved memory for ``model`` (a wrapped decoder); it goes on as the one that was saved would have.

        Args:
            path: the folder given to ``save``.
            model: the decoder, with the adapters and config that the memory was made with; store, eviction, budget
                (``long_term_tokens``) and backend may differ.
            tokenizer: lets ``write`` take text.
            store: keep the long-term rows in another store than the model's config names.
            eviction: another eviction policy than the memory had.
            device: where the rows are kept; default: where the decoder's embedding is.

        Raises:
            MemoryFileError: missing, truncated, altered, foreign, or newer file.
            MemoryMismatchError: made by another model, adapter, dtype or config; says what differs.
        """
        from mplus.memory.files import load

        return load(
            path,
            engine_of(model),
            tokenizer=tokenizer,
            store=None if store is None else Component.of(store),
            eviction=None if eviction is None else Component.of(eviction),
            device=device,
        )
