"""Memory: what one conversation, user or book has left in a decoder; one stream per batch row."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from attrs import evolve
from torch import Tensor

from mplus.errors import InputError, MemoryMismatchError, NonFiniteError
from mplus.memory.chunking import check_vocabulary, split, to_rows
from mplus.memory.engine import Engine
from mplus.memory.progress import progress_bar
from mplus.memory.report import SourceInfo, WriteReport
from mplus.memory.stream import Source, StreamState, StreamView
from mplus.stores.base import MemoryStore
from mplus.stores.eviction import EvictionPolicy

if TYPE_CHECKING:
    from mplus.mechanisms.base import WriteContext


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
        """The long-term store of each stream. Change it only through the memory."""
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
        """Bytes of all rows, short-term, pending and long-term (reserved capacity included)."""
        return sum(state.nbytes for state in self._states) + sum(store.nbytes for store in self._stores)

    def snapshot(self) -> tuple[StreamView, ...]:
        """An immutable view of every stream, taken at one instant."""
        with self._state_lock:
            return tuple(StreamView(state, store.snapshot()) for state, store in zip(self._states, self._stores, strict=True))

    def sources(self, row: int = 0) -> list[SourceInfo]:
        """The sources of batch row ``row``, in order of first writing, with the rows still held of each."""
        view = self.snapshot()[row]
        layers = range(len(view.state.stm))
        places = (
            [view.state.stm[layer].source for layer in layers],
            [view.state.pending[layer].source for layer in layers],
            [_column(view, layer) for layer in layers],
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
            NonFiniteError: the decoder gave NaN or Inf for a chunk; the chunks before it are kept, it is not.
        """
        begun = time.perf_counter()
        rows = to_rows(data, self.batch_size, self.tokenizer)
        names: list[str | None] = list(source) if isinstance(source, Sequence) and not isinstance(source, str) else [source] * len(rows)
        if len(names) != len(rows):
            raise InputError(f"source must be one name or one per batch row ({len(rows)}), got {len(names)} names")
        config = self.engine.config
        chunks: list[list[Tensor]] = []
        for ids in rows:
            if ids is not None:
                check_vocabulary(ids, self.engine.vocab_size)
            chunks.append([] if ids is None else split(ids, config.chunk_tokens, config.min_chunk_tokens))
        report = WriteReport([0] * len(rows), [0] * len(rows), [0] * len(rows), [0] * len(rows), 0.0)
        total = sum(len(c) for row in chunks for c in row)
        with self._write_lock, progress_bar("writing", total, progress, steps=max(map(len, chunks))) as advance:
            for turn in range(max(map(len, chunks))):
                present = {row: row_chunks[turn] for row, row_chunks in enumerate(chunks) if turn < len(row_chunks)}
                for group in _alike(present, self._states):
                    self._write_group(group, {row: present[row] for row in group}, names, report)
                    advance(sum(len(present[row]) for row in group))
        return evolve(report, seconds=time.perf_counter() - begun)

    def write_chunk(self, ids: Tensor, source: str | None = None) -> WriteReport:
        """Write one chunk ``[B, n]`` to every stream in one pass, without splitting.

        Raises:
            InputError: shape, vocabulary, or n outside ``min_chunk_tokens`` .. ``chunk_tokens``.
            NonFiniteError: as ``write``; nothing was changed.
        """
        begun = time.perf_counter()
        config = self.engine.config
        if ids.dim() != 2 or ids.shape[0] != self.batch_size:
            raise InputError(f"a chunk must have shape [{self.batch_size}, n], got {list(ids.shape)}")
        if not config.min_chunk_tokens <= ids.shape[1] <= config.chunk_tokens:
            raise InputError(
                f"a chunk must have min_chunk_tokens to chunk_tokens ({config.min_chunk_tokens} to {config.chunk_tokens}) "
                f"tokens, got {ids.shape[1]}: use write, which splits and joins"
            )
        check_vocabulary(ids, self.engine.vocab_size)
        n = self.batch_size
        report = WriteReport([0] * n, [0] * n, [0] * n, [0] * n, 0.0)
        with self._write_lock:
            for group in _alike(dict(enumerate(ids)), self._states):
                self._write_group(group, {row: ids[row] for row in group}, [source] * n, report)
        return evolve(report, seconds=time.perf_counter() - begun)

    @torch.no_grad()
    def _write_group(
        self, group: Sequence[int], ids: dict[int, Tensor], names: Sequence[str | None], report: WriteReport
    ) -> None:
        """Write one chunk each to the streams of ``group``, which read equally many context rows; all or nothing."""
        states = [self._states[row] for row in group]
        batch = torch.stack([ids[row] for row in group]).to(self.engine.device)
        blocks = self.engine.encode(states, batch)
        for layer, block in enumerate(blocks):
            if not bool(torch.isfinite(block).all()):
                raise NonFiniteError(
                    f"the decoder gave NaN or Inf in layer {layer} for a chunk of {batch.shape[1]} tokens; it was not "
                    "written: check the weights, or use a wider dtype than " + str(block.dtype)
                )
        with self._transaction() as new_states:
            for place, row in enumerate(group):
                state, number = _open_source(self._states[row], names[row], batch.shape[1])
                absorbed = self.engine.mechanism.absorb(
                    state, [block[place] for block in blocks], number, self._write_context(row)
                )
                new_states[row] = absorbed.state
                report.tokens[row] += batch.shape[1]
                report.chunks[row] += 1
                report.dropped_rows[row] += absorbed.dropped
                report.evicted_rows[row] += absorbed.evicted

    def _write_context(self, row: int) -> WriteContext:
        from mplus.mechanisms.base import WriteContext  # mechanisms build on memory

        generator = self.generators[row]
        return WriteContext(
            store=self._stores[row],
            eviction=self.eviction,
            draw=lambda n: torch.randperm(n, generator=generator),
            keys=self.engine.keys,
        )

    @contextmanager
    def _transaction(self) -> Iterator[list[StreamState]]:
        """Change states and stores together; on any exception, an interrupt included, all is as before."""
        with self._state_lock:
            before = [store.snapshot() for store in self._stores]
            draws = [generator.get_state() for generator in self.generators]
            states = list(self._states)
            after: tuple[StreamState, ...] | None = None
            try:
                yield states
                after = tuple(states)
                self._states, self._version = after, self._version + 1
            except BaseException:
                if self._states is not after:
                    for store, snapshot in zip(self._stores, before, strict=True):
                        store.restore(snapshot)
                    for generator, state in zip(self.generators, draws, strict=True):
                        generator.set_state(state)
                raise

    # ------------------------------------------------------------------ the rest of its life

    def forget(self, source: str | None, row: int | None = None) -> int:
        """Remove every row written from ``source`` (in batch row ``row``, or in all).

        The STM grows back afterwards. Rows written *later* may have taken something over from the rows removed, since
        a write reads the newest rows; forks and saved copies are other memories. Both stay.

        Returns:
            Rows removed, summed over layers and batch rows.

        Raises:
            InputError: no stream has this source; the message lists the ones there are.
        """
        which = range(self.batch_size) if row is None else [row]
        removed, known = 0, False
        with self._write_lock, self._transaction() as states:
            for stream in which:
                state, store = states[stream], self._stores[stream]
                numbers = [n for n, entry in enumerate(state.sources) if entry.name == source and entry.chunks]
                if not numbers:
                    continue
                known, number = True, numbers[0]
                stm = tuple(rows.select(rows.source != number) for rows in state.stm)
                pending = tuple(rows.select(rows.source != number) for rows in state.pending)
                removed += sum(map(len, (*state.stm, *state.pending))) - sum(map(len, (*stm, *pending)))
                for layer in range(store.layout.layers):
                    gone = store.ids(layer)[store.column(layer, "source") == number]
                    if len(gone):
                        store.remove(layer, gone)
                        removed += len(gone)
                sources = tuple(Source(entry.name) if n == number else entry for n, entry in enumerate(state.sources))
                states[stream] = evolve(state, stm=stm, pending=pending, sources=sources)
            if not known:
                names = sorted({repr(entry.name) for state in states for entry in state.sources if entry.chunks})
                raise InputError(f"there is no source {source!r} in this memory; its sources: {', '.join(names) or 'none'}")
        return removed

    def reset(self) -> None:
        """Back to a new memory; the generators go on from where they are."""
        with self._write_lock, self._transaction() as states:
            for row, store in enumerate(self._stores):
                states[row] = self.engine.mechanism.new_state(store.layout)
                for layer in range(store.layout.layers):
                    ids = store.ids(layer)
                    if len(ids):
                        store.remove(layer, ids)

    def fork(self) -> Memory:
        """An independent memory with the same content and the same future draws."""
        with self._state_lock:
            generators = []
            for generator in self.generators:
                twin = torch.Generator()
                twin.set_state(generator.get_state())
                generators.append(twin)
            return Memory(self.engine, self._states, [store.fork() for store in self._stores], generators, self.eviction, self.tokenizer)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Memory:
        """A memory with the same content on another device or in another dtype (an independent copy)."""

        def move(rows: Sequence[Any]) -> tuple[Any, ...]:
            return tuple(part.to(device if device is not None else self.device, dtype) for part in rows)

        twin = self.fork()
        twin._states = tuple(evolve(state, stm=move(state.stm), pending=move(state.pending)) for state in twin._states)
        twin._stores = tuple(store.to(device, dtype) for store in twin._stores)
        return twin

    def save(self, path: str | Path) -> None:
        """Write a folder with a JSON manifest and safetensors; an older save there stays whole until this one is.

        Raises:
            MemoryFileError: ``path`` cannot be written, or holds something that is not a memory.
        """
        from mplus.memory.files import save

        with self._write_lock:
            save(self, path)

    @staticmethod
    def load(path: str | Path, model: Any, *, tokenizer: Any = None, store: Any = None) -> Memory:
        """Read a saved memory for ``model`` (a wrapped decoder).

        Args:
            store: keep the long-term rows in another store than the model's config names.

        Raises:
            MemoryFileError: missing, truncated, altered, foreign, or newer file.
            MemoryMismatchError: made by another model, adapter, dtype or config; says what differs.
        """
        from mplus.memory.files import load

        return load(path, engine_of(model), tokenizer=tokenizer, store=store)


def engine_of(model: Any) -> Engine:
    """The engine of a wrapped decoder. Raises MemoryMismatchError for anything else."""
    engine = getattr(model, "mplus_engine", None)
    if engine is None:
        raise MemoryMismatchError(f"a memory needs a decoder wrapped by mplus.wrap, got {type(model).__name__}")
    return engine  # type: ignore[no-any-return]


def _column(view: StreamView, layer: int) -> Tensor:
    column = view.store.column(layer, "source")
    assert column is not None  # every layout has sources
    return column


def _alike(chunks: dict[int, Tensor], states: Sequence[StreamState]) -> list[list[int]]:
    """Batch rows that can share one pass: same chunk length, same number of short-term rows in every layer."""
    groups: dict[Any, list[int]] = {}
    for row, ids in chunks.items():
        groups.setdefault((len(ids), tuple(len(rows) for rows in states[row].stm)), []).append(row)
    return list(groups.values())


def _open_source(state: StreamState, name: str | None, tokens: int) -> tuple[StreamState, int]:
    """Count ``tokens`` of one chunk under ``name``; returns the state and the source's number."""
    for number, entry in enumerate(state.sources):
        if entry.name == name:
            grown = evolve(entry, tokens=entry.tokens + tokens, chunks=entry.chunks + 1)
            return evolve(state, sources=(*state.sources[:number], grown, *state.sources[number + 1 :])), number
    return evolve(state, sources=(*state.sources, Source(name, tokens, 1))), len(state.sources)


