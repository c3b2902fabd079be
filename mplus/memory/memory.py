"""Memory: what one conversation, user or book has left in a decoder; one stream per batch row."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Self, SupportsIndex, cast

import torch
from torch import Tensor

from mplus.config import Component, JsonValue
from mplus.errors import InputError
from mplus.memory.copying import check_row, check_rows, check_target, copied, moved, pickle_error
from mplus.memory.directory import JOURNAL_BYTES
from mplus.memory.engine import Engine, engine_of
from mplus.memory.report import ForgetReport, SourceInfo, WriteReport, describe
from mplus.memory.sources.forget import forgotten_names
from mplus.memory.sources.listing import sources_of
from mplus.memory.sources.rebuild import drop_source, rebuild_without, reset
from mplus.memory.state import StreamState, StreamView
from mplus.memory.transaction import Streams
from mplus.memory.writing.chunking import Ids, SourceNames, Tokenizer, WriteData
from mplus.memory.writing.pieces import write_pieces
from mplus.memory.writing.write import write, write_chunk
from mplus.stores.base import MemoryStore

if TYPE_CHECKING:
    from mplus.memory.directory.directory import Directory


class Memory:
    """Everything a decoder remembers of some texts: explicit state that is passed to it, never part of the model.

    Made by ``model.new_memory``, ``Memory.load`` or ``Memory.open``. Reading never changes it, and works on a snapshot,
    so that a write in another thread does not disturb it. Writes to one memory are made one after the other.

    A memory that ``Memory.open`` returns lives in a directory: every chunk is on disk as soon as it has been written,
    and ``forget`` and ``reset`` rewrite each file that held what is gone. Any change may then also raise
    MemoryFileError (the disk is full, say; memory and directory are as before) or LiveMemoryError (opened for reading,
    closed, or the disk failed in a way that leaves its state unknown; reading goes on). Copies live in memory only.

    Example:
        >>> memory = model.new_memory(tokenizer=tokenizer)
        >>> report = memory.write("Once upon a time Ada had an office in room 12, next to the stairs.", source="mail")
        >>> answer = model.generate(**question, memory=memory, max_new_tokens=8)
        >>> [source.name for source in memory.sources()]
        ['mail']
        >>> memory.forget("mail").chunks
        1

    Attributes:
        streams: the content, on which the parts of mplus that write, save and forget work.
        tokenizer: turns text into ids for ``write``; may be None.
    """

    def __init__(self, streams: Streams, tokenizer: Tokenizer | None = None) -> None:
        self.streams = streams
        self.tokenizer = tokenizer

    # ------------------------------------------------------------------ writing

    def write(self, data: WriteData, source: SourceNames = None, *, progress: bool | None = None) -> WriteReport:
        """Read text into memory, chunk by chunk; an error or interrupt leaves the chunks before it, and nothing else.

        Args:
            data: a text; ids ``[n]`` or ``[B, n]``; or a list with a text, ids or None (skip) per batch row.
            source: name that ``sources``, ``forget`` and retrieval reports use; one, or one per batch row.
            progress: show a progress bar; None: for long writes in a terminal.

        Raises:
            InputError: wrong batch size, ids outside the vocabulary, text too short or none; nothing was written.
            MemoryMismatchError: the decoder's dtype is not that of the memory; or rows are kept as keys and values
                only, and were made with other adapters or weights.
            NonFiniteError: the decoder gave NaN or Inf for a chunk, which was not written.
        """
        return write(self, data, source, progress)

    def write_pieces(
        self, pieces: Iterable[str | Ids], source: str | None = None, *, progress: bool | None = None
    ) -> WriteReport:
        """Read a long document that comes in pieces, say the lines of a file, without ever holding all of it.

        Another thread fetches and tokenises the next piece meanwhile. Chunks are cut as ``write`` cuts a whole text.

        Args:
            pieces: texts or ids ``[n]``, in order; empty ones are skipped. For a memory of one batch row.
            source: name of the document.
            progress: show a progress bar; None: in a terminal.

        Raises:
            InputError, MemoryMismatchError, NonFiniteError: as ``write``; and what ``pieces`` itself raises. The chunks
                written until then are kept.
        """
        return write_pieces(self.streams, self.tokenizer, pieces, source, progress)

    def write_chunk(self, ids: Tensor, source: str | None = None) -> WriteReport:
        """Write one chunk ``[B, n]`` to every stream in one pass, without splitting.

        Raises as ``write``; InputError also where n is not in ``min_chunk_tokens`` .. ``chunk_tokens``.
        """
        return write_chunk(self.streams, ids, source)

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

        Rows written *later* may have taken something over from the rows removed, since a write reads the newest rows.
        With ``mode="drop"`` they stay, and the STM grows back. With ``mode="rebuild"`` all other texts are written
        again from the beginning: the memory is what it would be had the source never been written. Forks and saved
        copies are other memories, and keep their rows either way.

        Args:
            source: a name that was given to ``write``.
            row: None: every batch row.
            mode: "drop", or "rebuild" for a memory that keeps its texts (``new_memory(keep_text=True)``). Rebuilding
                takes as long as writing did and needs room for a second memory; reads go on meanwhile.
            keep_name: let ``forgotten`` list the name, and files say it. Else no trace of the source is left in the
                memory, nor in any file of its directory. Forgetting the name once more removes it.
            progress: as for ``write``.

        Raises:
            InputError: no stream has this source, there is no such row or mode, or the memory keeps no texts.
            MemoryMismatchError, NonFiniteError: as ``write``, when rebuilding; nothing was changed.
            MemoryFileError: a file could not be removed. The memory has forgotten all the same.
        """
        rows = range(self.batch_size) if row is None else [check_row(row, self.batch_size)]
        if mode not in ("drop", "rebuild"):
            raise InputError(f"mode must be 'drop' or 'rebuild', got {mode!r}")
        with self.streams.write_lock:
            if mode == "drop":
                report = drop_source(self.streams, rows, source, keep_name=keep_name)
            else:
                report = rebuild_without(self.streams, rows, source, keep_name=keep_name, progress=progress)
            self.streams.persistence.check_removed()
        return report

    def reset(self) -> None:
        """Become a new memory, all names forgotten; the generators go on. Raises MemoryFileError as ``forget``."""
        with self.streams.write_lock:
            reset(self.streams)
            self.streams.persistence.check_removed()

    def fork(self, row: int | None = None) -> Memory:
        """Return an independent memory with the same content and future draws; of one batch row, or of all."""
        rows = range(self.batch_size) if row is None else [check_row(row, self.batch_size)]
        return Memory(copied(self.streams, rows), self.tokenizer)

    __copy__ = fork

    def __deepcopy__(self, memo: dict[int, Any]) -> Memory:
        """Return a fork; where the decoder is copied along, it belongs to that copy."""
        twin, model = self.fork(), getattr(self.engine, "model", self.engine)
        if id(model) in memo or id(self.engine) in memo:
            twin.streams.engine = copy.deepcopy(self.engine, memo)
        return twin

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Raise MemoryPickleError: a memory belongs to a decoder, and its rows may lie in files."""
        raise pickle_error()

    def select(self, rows: Sequence[int] | Sequence[bool] | Tensor) -> Memory:
        """Return an independent memory of these batch rows, in this order; a row may come several times.

        Copies of a row share everything until written. (To read a memory of one stream with a batch, pass it as it is.)

        Args:
            rows: numbers, as a list or ``[n]`` tensor (of beams, say), or a mask with a bool for each batch row.

        Raises InputError: no rows, or there is no such batch row (negative numbers do not count from the end).
        """
        return Memory(copied(self.streams, check_rows(rows, self.batch_size)), self.tokenizer)

    def to(
        self, device: torch.device | str | int | torch.dtype | Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Memory:
        """Return an independent copy on another device or in another dtype.

        Args:
            device, dtype: as of ``torch.Tensor.to``: a device, a floating dtype, or both; or a tensor that has both.

        Raises InputError: rows cannot be kept in that dtype, or on the meta device.
        """
        return Memory(moved(self.streams, *check_target(device, dtype)), self.tokenizer)

    # ------------------------------------------------------------------ on disk

    def save(self, path: str | Path, *, file_mode: int | None = None) -> None:
        """Write a folder with a JSON manifest and safetensors; an older save there stays whole until this one is.

        Args:
            path: of the folder; made with its parents where it does not exist.
            file_mode: permission bits of the files, whatever the umask is: ``0o640`` shares them with the group. None:
                those of an older save there, else only their owner can read them. Folders that are made get bits to
                match; one that exists stays as it is.

        Raises:
            MemoryFileError: ``path`` cannot be written, or holds something that is not a memory.
        """
        from mplus.memory.format.save import save_streams

        save_streams(path, self.streams, file_mode)

    @staticmethod
    def load(
        path: str | Path,
        model: Any,
        *,
        tokenizer: Tokenizer | None = None,
        store: JsonValue | Component = None,
        eviction: JsonValue | Component = None,
        bytes_budget: int | str | None = None,
        device: torch.device | str | None = None,
    ) -> Memory:
        """Read a saved memory for ``model`` (a wrapped decoder); it goes on as the one that was saved would have.

        Args:
            path: the folder given to ``save``.
            model: with what mplus added when the memory was made; store, eviction, capacity (but for none), backend,
                chunk size and number of retrieved rows may differ. Under other adapters of the user rows that have
                hidden states are projected anew, with a warning.
            tokenizer: lets ``write`` take text.
            store: another store for long-term rows than the model's config names.
            eviction: another eviction policy than the memory had. Under "ttl" the lifetime of rows without one begins.
            bytes_budget: another budget than the memory had (see ``new_memory``); it holds from the next write on.
            device: where the rows are kept; default: where the decoder's embedding is.

        Raises:
            MemoryFileError: missing, truncated, altered, foreign, or newer file.
            MemoryMismatchError: made by another model, dtype or config, or (keys and values only) with other adapters
                or weights; says what differs.
            ConfigError: the budget is too small, or no number of bytes.
        """
        from mplus.memory.format.load import load_streams

        kind = None if store is None else Component.of(store)
        policy = None if eviction is None else Component.of(eviction)
        (engine := engine_of(model)).check_options(store=store, eviction=eviction, bytes_budget=bytes_budget)
        return Memory(load_streams(path, engine, kind, policy, bytes_budget, device), tokenizer)

    @staticmethod
    def open(
        path: str | Path,
        model: Any,
        *,
        batch_size: int | None = None,
        tokenizer: Tokenizer | None = None,
        seed: int = 0,
        store: JsonValue | Component = None,
        eviction: JsonValue | Component = None,
        bytes_budget: int | str | None = None,
        memory_rows: Literal["projected", "hidden", "both"] | None = None,
        keep_text: bool = False,
        device: torch.device | str = "cpu",
        read_only: bool = False,
        journal_bytes: int = JOURNAL_BYTES,
        file_mode: int | None = None,
    ) -> Memory:
        """Open the memory that lives in the directory ``path``, or make a new one there; ``with`` closes it.

        Args:
            path: made with its parents where it does not exist.
            model: the wrapped decoder; of a memory that exists, the one it was made for, as for ``load``.
            batch_size: of a new memory (default 1); of one that exists it must be right, if given.
            tokenizer: lets ``write`` take text.
            seed, memory_rows, keep_text: of a new memory, as for ``new_memory``.
            store: default: the config's; mapped files take the place of its innermost one. A store that changes rows
                (``quantized``) stays as the directory was made, one that does not (``tiered``) is as given now.
            eviction, bytes_budget: of a new memory, or others than the memory had.
            device: where short-term rows are, and long-term rows are read; another one than the CPU needs a store
                "tiered" (which was not run on a GPU).
            read_only: read what is there now, beside a process that writes; changes are refused.
            journal_bytes: write a new checkpoint when the journal is longer than this; opening reads all of it.
            file_mode: permission bits of files that are written, as for ``save``.

        Raises:
            MemoryFileError: ``path`` cannot be read or written, is truncated, altered or foreign, or of a newer format.
            MemoryMismatchError: as ``load``, or made with another batch size.
            LiveMemoryError: it is open for writing already; says by which process.
            NotSupported, ConfigError: the store reads rows on the CPU only; an option breaks its rule.
        """
        from mplus.memory.directory.open import open_streams

        (engine := engine_of(model)).check_options(store=store, eviction=eviction, bytes_budget=bytes_budget)
        new = partial(model.new_memory, seed=seed, memory_rows=memory_rows, keep_text=keep_text)
        streams = open_streams(
            path, engine, new, batch_size=batch_size, store=store, eviction=eviction, bytes_budget=bytes_budget,
            device=device, read_only=read_only, journal_bytes=journal_bytes, file_mode=file_mode,
        )  # fmt: skip
        return Memory(streams, tokenizer)

    @property
    def directory(self) -> Directory | None:
        """The files of a memory in a directory; None: it is in memory only, or was opened for reading."""
        return cast("Directory | None", self.streams.persistence.directory)

    def checkpoint(self) -> None:
        """Write a checkpoint now, so that the journal begins anew and the next opening is fast.

        Raises MemoryFileError and LiveMemoryError (also where the memory lives in no directory); all is as before.
        """
        self.streams.checkpoint()

    def close(self) -> None:
        """Write a checkpoint if anything was written since the last one, and let others open the directory; idempotent.

        Afterwards a memory in a directory can be read, but not changed. Raises MemoryFileError where the checkpoint
        cannot be written: the directory is closed, and nothing is lost, since the journal has it.
        """
        self.streams.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ------------------------------------------------------------------ looking

    @property
    def engine(self) -> Engine:
        """The wrapped decoder this memory belongs to."""
        return self.streams.engine

    @property
    def batch_size(self) -> int:
        """Number of independent streams B."""
        return len(self.streams)

    @property
    def version(self) -> int:
        """Number that grows with every change; a key/value cache made under one version does not fit another."""
        return self.streams.version

    @property
    def states(self) -> tuple[StreamState, ...]:
        """The present state of each stream (immutable)."""
        return self.streams.states

    @property
    def stores(self) -> tuple[MemoryStore, ...]:
        """The long-term store of each stream; changed only through the memory."""
        return self.streams.stores

    @property
    def device(self) -> torch.device:
        """Where the rows are kept."""
        return self.streams.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the rows."""
        return self.streams.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all rows, short-term, pending and long-term (reserved capacity included); what is shared, once."""
        return self.streams.nbytes

    @property
    def capacity(self) -> int | None:
        """Long-term rows that each layer of a stream may hold after a write; None: no limit."""
        return self.streams.budget.capacity

    @property
    def text_capacity(self) -> int | None:
        """Text tokens whose rows the LTM of a stream has room for, if written in full chunks; None: no limit."""
        return self.streams.budget.text_tokens(self.engine.mechanism)

    def snapshot(self) -> tuple[StreamView, ...]:
        """Return an immutable view of every stream, taken at one instant."""
        return self.streams.versioned_snapshot()[1]

    def sources(self, row: int = 0) -> list[SourceInfo]:
        """List the sources of batch row ``row``, in order of first writing, with the rows still held of each.

        The next ``save`` or checkpoint drops sources of which no row, text or tail is held. Raises InputError: there is
        no such batch row.
        """
        row = check_row(row, self.batch_size)
        return sources_of(self.snapshot()[row], self.engine.config.memory_tokens_per_chunk)

    def forgotten(self, row: int = 0) -> list[str | None]:
        """List names of sources of batch row ``row`` that ``forget(keep_name=True)`` left nothing of but the name.

        A name that is written again is no longer among them. Raises InputError: there is no such batch row.
        """
        return forgotten_names(self.states[check_row(row, self.batch_size)])

    def __repr__(self) -> str:
        return f"Memory({describe(self.streams)})"
