"""StoredMemory: the life of a memory on disk, saved as a whole or lived in a directory."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import torch
from torch import nn

from mplus.config import Component, JsonValue
from mplus.memory.content import MemoryContent
from mplus.memory.directory import JOURNAL_BYTES
from mplus.memory.engine import engine_of
from mplus.memory.report import WriteReport
from mplus.memory.sources.clock import Clock
from mplus.memory.sources.expiry import expire
from mplus.memory.writing.passes import flush
from mplus.tokenizer import Tokenizer

if TYPE_CHECKING:
    from mplus.memory.archive.tar import Origin
    from mplus.memory.directory.directory import Directory
    from mplus.memory.format.tensors import Sink


class StoredMemory(MemoryContent):
    """A memory that files can hold: a folder that is written at once, or a directory that has every change."""

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
        from mplus.memory.format.save import save, saved_content

        save(path, *saved_content(self.streams), file_mode)

    def export(self, file: str | Path | Sink) -> int:
        """Write the memory, as it is at the call, as one stream of bytes; ``import_`` reads it back.

        Writers go on meanwhile. The same memory gives the same bytes: a tar of plain files, which unpacked is a folder
        that ``load`` reads.

        Args:
            file: a path, of a file that is replaced once the new one is on disk, for its owner to read; or a binary
                file, of which ``write`` is called, with at most 64 MiB at a time.

        Returns:
            How many bytes were written.

        Raises:
            MemoryFileError: the file at the path cannot be written.
            InputError: it is neither a path nor a file.

        Example:
            >>> memory.export("anna.mplus")  # doctest: +SKIP
            184320
        """
        from mplus.memory.archive.export import export_streams

        return export_streams(self.streams, file)

    def import_(self, file: str | Path | Origin, *, max_bytes: int | None = None) -> None:
        """Become what another memory was when it was exported, as one change: wholly, or not at all.

        All of it is checked before anything changes: form, sizes, digests, values, and that it belongs to this decoder.
        This memory must be empty, and keeps its store, eviction policy and budget. What is read goes to disk, under the
        directory's quota where the memory lives in one, and a crash on the way leaves the memory empty.

        Args:
            file: what ``export`` wrote: its path, or a binary file, of which ``read`` is called, in order.
            max_bytes: refuse more than that; None: no limit but the free disk.

        Raises:
            MemoryFileError: it is truncated, altered, foreign, newer, or holds something else than plain files.
            MemoryMismatchError: it belongs to another decoder, or has another batch size.
            MemoryFullError: it is larger than ``max_bytes`` or the free disk.
            InputError: this memory is not empty.
            LiveMemoryError: as ``write``.

        Example:
            >>> with mplus.Memory.open("anna", model) as memory:  # doctest: +SKIP
            ...     memory.import_("anna.mplus", max_bytes=2**30)
        """
        from mplus.memory.archive.importing import import_streams

        import_streams(self.streams, file, max_bytes)

    @classmethod
    def from_export(
        cls,
        path: str | Path,
        file: str | Path | Origin,
        model: Any,
        *,
        max_bytes: int | None = None,
        tokenizer: Tokenizer | None = None,
        store: JsonValue | Component = None,
        eviction: JsonValue | Component = None,
        bytes_budget: int | str | None = None,
        file_mode: int | None = None,
        clock: Clock | None = None,
    ) -> Self:
        """Make the directory ``path`` of an exported memory, and open it: wholly, or nothing is there.

        A crash on the way leaves nothing at ``path``, and a folder ``.mplus-new-...`` beside it, which
        ``mplus.memory.directory.removal.remove_deleted`` removes.

        Args:
            path: of the directory; not there yet, or empty.
            file, max_bytes: as for ``import_``.
            model: the wrapped decoder that the memory belongs to.
            tokenizer, store, eviction, bytes_budget, file_mode, clock: as for ``open``.

        Raises:
            MemoryFileError: there is something at ``path``, it cannot be written; or as ``import_``.
            MemoryMismatchError, MemoryFullError, InputError: as ``import_``.

        Example:
            >>> memory = mplus.Memory.from_export("anna", "anna.mplus", model)  # doctest: +SKIP
        """
        from mplus.memory.archive.importing import import_streams
        from mplus.memory.directory.new import new_directory

        given: dict[str, Any] = {"tokenizer": tokenizer, "store": store, "eviction": eviction, "file_mode": file_mode}
        given |= {"bytes_budget": bytes_budget, "clock": clock}
        with new_directory(Path(path)) as place, cls.open(place, model, **given) as memory:
            import_streams(memory.streams, file, max_bytes, any_batch=True)
            memory.streams.close()  # what waits goes on waiting
        return cls.open(path, model, **given)

    @property
    def is_empty(self) -> bool:
        """True if nothing was written, or all of it was reset: ``import_`` takes no other memory."""
        from mplus.memory.archive.importing import is_empty

        return is_empty(self.streams)

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: nn.Module,
        *,
        tokenizer: Tokenizer | None = None,
        store: JsonValue | Component = None,
        eviction: JsonValue | Component = None,
        bytes_budget: int | str | None = None,
        device: torch.device | str | None = None,
        clock: Clock | None = None,
    ) -> Self:
        """Read a saved memory for ``model`` (a wrapped decoder); it goes on as the one that was saved would have.

        Args:
            path: the folder given to ``save``.
            model: with what mplus added when the memory was made; store, eviction, capacity (but for none), backend,
                chunk size and number of retrieved rows may differ. Under other adapters of the user rows that have
                hidden states are projected anew, with a warning.
            tokenizer: lets ``write`` take text; None: the one that was given to ``mplus.wrap``, if one was.
            store: another store for long-term rows than the model's config names.
            eviction: another eviction policy than the memory had. Under "ttl" the lifetime of rows without one begins.
            bytes_budget: another budget than the memory had (see ``new_memory``); it holds from the next write on.
            device: where the rows are kept; default: where the decoder's embedding is.
            clock: returns the present time, a datetime with a timezone; default: that of the computer, in UTC.

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
        memory = cls(
            load_streams(path, engine, kind, policy, bytes_budget, device, clock),
            engine.tokenizer if tokenizer is None else tokenizer,
        )
        expire(memory.streams)
        return memory

    @classmethod
    def open(
        cls,
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
        clock: Clock | None = None,
        wait: float = 0.0,
    ) -> Self:
        """Open the memory that lives in the directory ``path``, or make a new one there; ``with`` closes it.

        Args:
            path: made with its parents where it does not exist.
            model: the wrapped decoder; of a memory that exists, the one it was made for, as for ``load``.
            batch_size: of a new memory (default 1); of one that exists it must be right, if given.
            tokenizer: lets ``write`` take text; None: the one that was given to ``mplus.wrap``, if one was.
            seed, memory_rows, keep_text: of a new memory, as for ``new_memory``.
            store: default: the config's; mapped files take the place of its innermost one. A store that changes rows
                (``quantized``) stays as the directory was made, one that does not (``tiered``) is as given now.
            eviction, bytes_budget: of a new memory, or others than the memory had.
            device: where short-term rows are, and long-term rows are read; another one than the CPU needs a store
                "tiered" (which was not run on a GPU).
            read_only: read what is there now, beside a process that writes; changes are refused.
            journal_bytes: write a new checkpoint when the journal is longer than this; opening reads all of it.
            file_mode: permission bits of files that are written, as for ``save``.
            clock: as for ``load``.
            wait: seconds to wait for another, in this process or elsewhere, that has it open for writing.

        Raises:
            MemoryFileError: ``path`` cannot be read or written, is truncated, altered or foreign, or of a newer format.
            MemoryMismatchError: as ``load``, or made with another batch size.
            LiveMemoryError: it is open for writing already, and after ``wait`` seconds still; says by which process.
            NotSupported, ConfigError: the store reads rows on the CPU only; an option breaks its rule.
        """
        from mplus.memory.directory.open import open_streams

        (engine := engine_of(model)).check_options(store=store, eviction=eviction, bytes_budget=bytes_budget)
        new = partial(model.new_memory, tokenizer=tokenizer, seed=seed, memory_rows=memory_rows, keep_text=keep_text)
        streams = open_streams(
            path, engine, new, batch_size=batch_size, store=store, eviction=eviction, bytes_budget=bytes_budget,
            device=device, read_only=read_only, journal_bytes=journal_bytes, file_mode=file_mode, clock=clock,
            wait=wait,
        )  # fmt: skip
        if not read_only:
            try:
                expire(streams)
            except BaseException:
                streams.persistence.close()
                raise
        return cls(streams, engine.tokenizer if tokenizer is None else tokenizer)

    @property
    def directory(self) -> Directory | None:
        """The files of a memory in a directory; None: it is in memory only, or was opened for reading."""
        return cast("Directory | None", self.streams.persistence.directory)

    def checkpoint(self) -> None:
        """Write a checkpoint now, so that the journal begins anew and the next opening is fast.

        Raises MemoryFileError and LiveMemoryError (also where the memory lives in no directory); all is as before.
        """
        self.streams.checkpoint()

    def flush(self) -> WriteReport:
        """Write the text that waits for more, each source's as a chunk of its own, however short it is.

        Text shorter than a chunk waits, and is read as it is, in front of a prompt. ``sources`` says how much of each.
        Once written, it costs a row for each of its tokens, but no more than a chunk does.

        Returns:
            The report of the write; its ``tokens`` are those that waited.

        Raises as ``write``; what was not written goes on waiting.
        """
        return flush(self.streams)

    def close(self) -> None:
        """Write what waits (``flush``), and a checkpoint if there is none of it, and let others open the directory.

        Afterwards a memory in a directory can be read, but not changed. Idempotent; of a memory that lives in no
        directory nothing is done. Raises MemoryFileError where the checkpoint cannot be written, and as ``flush``: the
        directory is closed all the same, and nothing is lost, since the journal has it.
        """
        try:
            if self.streams.persistence.is_open:
                self.flush()
        finally:
            self.streams.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:  # what waits is on disk, and the decoder may be what failed
            self.streams.close()
