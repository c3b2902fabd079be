"""Memory: what one conversation, user or book has left in a decoder; one stream per batch row."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from attrs import evolve
from torch import Tensor

from mplus.config import Component
from mplus.errors import InputError
from mplus.memory.checks import check_chunk, check_dtype, check_row, check_rows, check_target, check_vocabulary
from mplus.memory.copying import copied, moved, pickle_error
from mplus.memory.engine import engine_of
from mplus.memory.opened import Opens
from mplus.memory.persistence import Stayed
from mplus.memory.report import ForgetReport, WriteReport
from mplus.memory.sharing import distinct, unshared
from mplus.memory.sources.forget import forget, names_to_keep, with_names
from mplus.memory.sources.rebuild import rebuilt
from mplus.memory.sources.recompute import out_of_date, refresh
from mplus.memory.state import StreamState
from mplus.memory.texts import Texts
from mplus.memory.weights_state import WeightsState
from mplus.memory.writing.chunking import to_names
from mplus.memory.writing.context import WriteContext
from mplus.memory.writing.write import Made, Stream, keys, write, write_streams
from mplus.stores.disk.folder import FILE_MODE

T = TypeVar("T")


class Memory(Opens):
    """Short-term rows, long-term rows and where they came from; explicit state that is passed to a decoder.

    Made by ``model.new_memory`` or ``Memory.load``. Reading never changes it. A read works on a snapshot, so a write
    in another thread does not disturb it; writes of one memory are serialised.
    """

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
            MemoryMismatchError: the decoder's dtype is not that of the memory; or rows are kept as keys and values
                only, and were made with other adapters or weights.
            NonFiniteError: the decoder gave NaN or Inf for a chunk; the chunks before it are kept, it is not.

        Whatever ends a write early, an interrupt included, leaves the chunks written before it and nothing else.
        """
        return write(self, data, source, progress)

    def write_pieces(
        self, pieces: Iterable[Any], source: str | None = None, *, progress: bool | None = None
    ) -> WriteReport:
        """Read one long document that comes in pieces, say the lines of a file, without ever holding all of it.

        The next piece is fetched and tokenised, in another thread, while the last one is written. Pieces are
        tokenised each by itself; their ids are then cut into chunks as ``write`` cuts those of a whole text.

        Args:
            pieces: texts or ids ``[n]``, in order; empty ones are skipped. For a memory of one batch row.
            source: name of the document.
            progress: show a progress bar; None: in a terminal.

        Raises:
            InputError: as ``write``, and what ``pieces`` itself raises; the chunks written until then are kept.
            MemoryMismatchError, NonFiniteError: as ``write``.
        """
        from mplus.memory.writing.pieces import write_pieces

        return write_pieces(self, pieces, source, progress)

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
        self.check_writable()
        self.keep_up(writing=range(self.batch_size))
        report = WriteReport.nothing(self.batch_size)
        with self._write_lock:
            write_streams([Stream(self, row, [ids[row]], names[row], report) for row in range(self.batch_size)])
        return evolve(report, seconds=time.perf_counter() - begun)

    def take_in(self, streams: Sequence[Stream], made: Sequence[Made], ids: Tensor, turn: int) -> None:
        """Let streams of this memory take in the rows made of one chunk each; all or nothing. Part of a write.

        Args:
            streams: b of them.
            made: what each gets.
            ids: ``[b, n]``, their chunks.
            turn: see ``mplus.memory.texts.Text``.
        """
        tokens = ids.shape[1]
        stayed: dict[int, Mapping[str, Sequence[Tensor]]] = {}
        moved: list[tuple[int, int]] = []

        def absorb(states: list[StreamState]) -> None:
            for stream, rows, text in zip(streams, made, ids, strict=True):
                row = stream.row
                state, number = states[row].with_source(stream.name, tokens)
                state = state.with_text(text, number, turn)
                context = self._context(row, rows.projected)
                absorbed = self.engine.mechanism.absorb(state, rows.hidden, number, context)
                states[row] = absorbed.state
                if absorbed.stayed is not None:
                    stayed[row] = absorbed.stayed
                moved.append((absorbed.dropped, absorbed.evicted))

        self._change(absorb, stayed)
        for stream, (dropped, evicted) in zip(streams, moved, strict=True):
            stream.report.count(stream.row, tokens, dropped, evicted)

    def _context(self, row: int, projected: Sequence[Tensor]) -> WriteContext:
        generator = self.generators[row]
        return WriteContext(
            store=self._stores[row],
            eviction=self.eviction,
            draw=lambda n: torch.randperm(n, generator=generator),
            keys=lambda layer, hidden: keys(self.engine, layer, hidden),
            projected=projected,
            capacity=self.capacity,
            usage=self._usage[row],
        )

    def _change(self, change: Callable[[list[StreamState]], T], stayed: Stayed | None = None) -> T:
        """Let ``change`` alter a list of the states, and the stores; on any exception all is as before.

        ``stayed``: of a write, filled by ``change``; None: it is another change.
        """
        # No context manager of our own: an interrupt on the way into its exit would leave the change half done.
        with self._state_lock:
            self._settle()  # an interrupt may have struck while the last change was being settled
            self._begin()
            self._stores = unshared(self._stores)
            states, begun = list(self._states), self._changing()
            try:
                result = change(states)
                self._tidy(states, stayed)
                begun.after = tuple(states)
                self._keep(begun.after, stayed)
                self._states, self._version = begun.after, self._version + 1
            except BaseException:
                begun.cut_off = True
                self._settle()
                raise
            self._begun = None
            return result

    def keep_up(self, now: WeightsState | None = None, *, writing: Sequence[int] | None = None) -> None:
        """Compute anew what depends on weights that have changed since; called before every read and write.

        Args:
            now: what the decoder computes with; None: look.
            writing: the batch rows that are to be written; None: all are to be read.

        Raises:
            MemoryMismatchError: that needs hidden states, and this memory keeps keys and values only.
        """
        now = self.engine.weights() if now is None else now
        if out_of_date(self, now, writing):
            with self._write_lock:
                due = out_of_date(self, now, writing)
                self._change(lambda states: self._refresh(states, due, now))
        if writing is not None:
            self._note_weights(now, writing)

    def _refresh(self, states: list[StreamState], due: Sequence[int], now: WeightsState) -> None:
        """Part of a change: rows get new ids, and notes on them move to copies, so that there is a way back."""
        self._usage = tuple(
            notes.fork() if notes is not None and row in due else notes for row, notes in enumerate(self._usage)
        )
        refresh(states, self._stores, self.engine, self._usage, due, now)

    def _note_weights(self, now: WeightsState, rows: Sequence[int]) -> None:
        """Rows that keep hidden states depend on what they were written with last; nothing that a read sees changes."""
        with self._state_lock:
            states = [
                evolve(s, weights=now) if n in rows and s.weights != now else s for n, s in enumerate(self._states)
            ]
            self._states = tuple(states)

    # ------------------------------------------------------------------ the rest of its life

    def forget(
        self,
        source: str | None,
        row: int | None = None,
        *,
        mode: Literal["drop", "rebuild"] = "drop",
        keep_name: bool = False,
        progress: bool | None = None,
    ) -> ForgetReport:
        """Remove every row written from ``source`` (in batch row ``row``, or in all), and its name.

        With ``mode="drop"`` the STM grows back afterwards. Rows written *later* may have taken something over from the
        rows removed, since a write reads the newest rows; they stay. Where only the newest rows have hidden states, and
        these are removed, the next write reads fewer. With ``mode="rebuild"`` all other texts are written again from
        the beginning, and the memory is what it would be had the source never been written. Forks and saved copies are
        other memories, and keep their rows either way.

        Args:
            source: a name that was given to ``write``.
            row: None: every batch row.
            mode: "drop", or "rebuild" for a memory that keeps its texts (``new_memory(keep_text=True)``). Rebuilding
                takes about as long as writing did, needs room for a second memory, and happens wholly or not at all;
                reads go on meanwhile.
            keep_name: let the name be listed by ``forgotten`` from now on, and say in files that it was forgotten. Else
                no trace of it is left in the memory; of one in a directory, in any of its files when this returns.
                Forgetting the name once more removes it.
            progress: show a progress bar when rebuilding; None: for long ones in a terminal.

        Returns:
            What was removed.

        Raises:
            InputError: no stream has this source (the message lists the ones there are), there is no such batch row
                or mode, or the memory does not keep its texts.
            MemoryMismatchError, NonFiniteError: as ``write``, when rebuilding; nothing was changed.
        """
        if row is not None:
            row = check_row(row, self.batch_size)
        if mode not in ("drop", "rebuild"):
            raise InputError(f"mode must be 'drop' or 'rebuild', got {mode!r}")
        rows = range(self.batch_size) if row is None else [row]
        with self._write_lock:
            if mode == "drop":
                dropped = self._change(lambda states: forget(states, self._stores, rows, source, keep_name=keep_name))
                for store in distinct(self._stores):
                    self.engine.mechanism.follow(store)
                return dropped
            other, report = rebuilt(self, rows, source, progress)
            names = names_to_keep(self._states, rows, source, keep_name=keep_name)
            self._change(lambda states: self._become(states, other, names))
            return report

    def _become(self, states: list[StreamState], other: Memory, names: Sequence[Sequence[str | None]]) -> None:
        """Take over all that ``other`` holds, and keep ``names`` of each stream; part of a change."""
        states[:] = map(with_names, other._states, names)
        self._stores, self.generators, self._usage = other._stores, other.generators, other._usage

    def reset(self) -> None:
        """Back to a new memory, all names forgotten; the generators go on from where they are."""

        def clear(states: list[StreamState]) -> None:
            for row, store in enumerate(self._stores):
                texts = None if states[row].texts is None else Texts.of(self.generators[row].get_state())
                states[row] = evolve(self.engine.new_state(store.layout), texts=texts)
                for layer in range(store.layout.layers):
                    store.remove(layer, store.ids(layer))

        with self._write_lock:
            self._change(clear)

    def fork(self, row: int | None = None) -> Memory:
        """An independent memory with the same content and the same future draws; of one batch row, or of all."""
        rows = range(self.batch_size) if row is None else [check_row(row, self.batch_size)]
        with self._state_lock:
            self._settle_rest()
            return copied(self, rows, lambda store: store.fork())

    def __copy__(self) -> Memory:
        """Return a fork."""
        return self.fork()

    def __deepcopy__(self, memo: dict[int, Any]) -> Memory:
        """Return a fork; where the decoder is copied along, it belongs to that copy."""
        twin, model = self.fork(), getattr(self.engine, "model", self.engine)
        if id(model) in memo or id(self.engine) in memo:
            twin.engine = copy.deepcopy(self.engine, memo)
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Raise MemoryPickleError: a memory belongs to a decoder, and its rows may lie in files."""
        raise pickle_error()

    def select(self, rows: Sequence[int] | Sequence[bool] | Tensor) -> Memory:
        """An independent memory of these batch rows, in this order; a row may come several times.

        Copies of a row share everything until they are written, and are retrieved from together; each goes on as the
        row itself would. (To read a memory of one stream with a batch, pass it as it is.)

        Args:
            rows: numbers, as a list or ``[n]`` tensor (of beams, say), or a mask with a bool for each batch row.

        Raises:
            InputError: no rows, or there is no such batch row. Negative numbers do not count from the end.
        """
        chosen = check_rows(rows, self.batch_size)
        with self._state_lock:
            self._settle_rest()
            return copied(self, chosen, lambda store: store.fork())

    def to(
        self, device: torch.device | str | int | torch.dtype | Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Memory:
        """A memory with the same content on another device or in another dtype (an independent copy).

        Args:
            device, dtype: as of ``torch.Tensor.to``: a device, a floating dtype, or both; or a tensor that has both.

        Raises:
            InputError: rows cannot be kept in that dtype, or on the meta device.
        """
        target = check_target(device, dtype)
        with self._state_lock:
            self._settle_rest()
            return moved(self, *target)

    def save(self, path: str | Path, *, file_mode: int = FILE_MODE) -> None:
        """Write a folder with a JSON manifest and safetensors; an older save there stays whole until this one is.

        Writing goes on meanwhile; what is saved is the memory at the call.

        Args:
            path: of the folder; made with its parents where it does not exist.
            file_mode: permission bits of the files, whatever the umask is. Only their owner can read them unless this
                says otherwise: ``0o640`` shares them with the group. Folders that are made can be looked into
                accordingly (``0o700``, ``0o750``); one that exists stays as it is.

        Raises:
            MemoryFileError: ``path`` cannot be written, or holds something that is not a memory.
        """
        from mplus.memory.format.save import Facts, save

        with self._state_lock:
            views = self.snapshot()
            draws = [generator.get_state() for generator in self.generators]
        facts = Facts.of(self.engine, self.eviction, self.budget, [view.state for view in views])
        indexes = [self.engine.mechanism.index_tensors(view.store) for view in views]
        save(path, views, draws, facts, indexes, file_mode)

    @staticmethod
    def load(
        path: str | Path,
        model: Any,
        *,
        tokenizer: Any = None,
        store: Any = None,
        eviction: Any = None,
        bytes_budget: int | str | None = None,
        device: torch.device | str | None = None,
    ) -> Memory:
        """Read a saved memory for ``model`` (a wrapped decoder); it goes on as the one that was saved would have.

        Args:
            path: the folder given to ``save``.
            model: the decoder, with what mplus added when the memory was made; store, eviction, capacity (but for
                none), backend, chunk size and number of retrieved rows may differ. Under other adapters of the user
                rows that have hidden states are projected anew, with a warning.
            tokenizer: lets ``write`` take text.
            store: keep the long-term rows in another store than the model's config names.
            eviction: another eviction policy than the memory had. Under "ttl" the lifetime of rows without one begins.
            bytes_budget: another budget than the memory had (see ``new_memory``); it holds from the next write on.
            device: where the rows are kept; default: where the decoder's embedding is.

        Raises:
            MemoryFileError: missing, truncated, altered, foreign, or newer file.
            MemoryMismatchError: made by another model, dtype or config, or kept as keys and values only that were
                made with other adapters or weights; says what differs.
            ConfigError: the budget is too small, or no number of bytes.
        """
        from mplus.memory.format.save import load

        return load(
            path,
            engine_of(model),
            tokenizer=tokenizer,
            store=None if store is None else Component.of(store),
            eviction=None if eviction is None else Component.of(eviction),
            bytes_budget=bytes_budget,
            device=device,
        )
