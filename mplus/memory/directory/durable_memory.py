"""LiveMemory: a memory whose every change is on disk before anybody can see it."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor

from mplus.errors import LiveMemoryError, MemoryFileError
from mplus.eviction.base import EvictionPolicy
from mplus.memory.budget import Budget
from mplus.memory.directory.checkpoint import Content
from mplus.memory.directory.directory import Directory
from mplus.memory.directory.record import encode
from mplus.memory.directory.store_stack import innermost
from mplus.memory.engine import Engine
from mplus.memory.format.folder import writable
from mplus.memory.format.save import Facts
from mplus.memory.memory import Memory
from mplus.memory.persistence import Stayed
from mplus.memory.report import ForgetReport
from mplus.memory.sources.forget import without_unused_sources
from mplus.memory.state import StreamState, StreamView
from mplus.memory.writing.write import Made, Stream
from mplus.stores.mmap import MmapStore


class LiveMemory(Memory):
    """A memory in a directory; made by ``Memory.open``. A context manager that closes it.

    When a chunk has been written (``write`` returns, or goes on to its next chunk), it is on disk: it survives the end
    of the process and of the power. The same holds for ``forget`` and ``reset``, which write all files anew that held
    what is gone. ``fork``, ``select`` and ``to`` give ordinary memories, which are kept nowhere.

    Changes may raise, besides what ``Memory`` says, MemoryFileError (the disk is full, say; memory and directory are as
    before) and LiveMemoryError (opened for reading, closed, or the disk failed in a way that leaves its state unknown;
    reading goes on).

    Attributes:
        directory: its files; None: opened for reading only.
        journal_bytes: a new checkpoint is written when the journal is longer than this.
    """

    def __init__(
        self,
        engine: Engine,
        content: Content,
        eviction: EvictionPolicy,
        directory: Directory | None,
        *,
        where: str,
        journal_bytes: int,
        budget: Budget,
        tokenizer: Any = None,
    ) -> None:
        generators = [torch.Generator().set_state(draw) for draw in content.draws]
        usage = [notes for notes in content.usage if notes is not None]
        super().__init__(engine, content.states, content.stores, generators, eviction, tokenizer, budget, usage)
        self.directory = directory
        self.journal_bytes = journal_bytes
        self._where = where
        self._next_checkpoint = journal_bytes
        if directory is not None:
            self._finalizer = weakref.finalize(self, Directory.close, directory)

    def check_writable(self) -> None:
        """Raise LiveMemoryError where nothing can be written."""
        if self.directory is None:
            raise LiveMemoryError(f"{self._where} was opened with read_only=True: open it for writing")
        with self._state_lock:
            self._settle_rest()
            self.directory.check()

    def take_in(self, streams: Sequence[Stream], made: Sequence[Made], ids: Tensor, turn: int) -> None:
        """As ``Memory.take_in``; when it returns, the chunk is on disk."""
        super().take_in(streams, made, ids, turn)
        size = self._own_directory().journal_bytes
        if size > self._next_checkpoint:
            try:
                self.checkpoint()
            except MemoryFileError as error:  # the chunk is on disk all the same
                self._next_checkpoint = 2 * size
                warnings.warn(
                    f"the journal goes on growing, since no checkpoint could be written: {error}", stacklevel=2
                )

    def forget(
        self,
        source: str | None,
        row: int | None = None,
        *,
        mode: Literal["drop", "rebuild"] = "drop",
        keep_name: bool = False,
        progress: bool | None = None,
    ) -> ForgetReport:
        """As ``Memory.forget``; when it returns, no file holds what was forgotten.

        Raises:
            MemoryFileError: besides what ``Memory.forget`` raises: a file could not be removed. The memory has
                forgotten all the same.
        """
        with self._write_lock:
            report = super().forget(source, row, mode=mode, keep_name=keep_name, progress=progress)
            self._own_directory().check_removed()
        return report

    def reset(self) -> None:
        """As ``Memory.reset``; raises MemoryFileError as ``forget``."""
        with self._write_lock:
            super().reset()
            self._own_directory().check_removed()

    def checkpoint(self) -> None:
        """Write a checkpoint now, so that the journal begins anew and the next opening is fast.

        Raises:
            MemoryFileError: it cannot be written; all is as before.
            LiveMemoryError: nothing can be.
        """
        self.check_writable()
        with self._write_lock, self._state_lock:
            token = object()  # not the states: these are what the last write began
            try:
                states = self._tidied(self._states)
                self._replace(token, states, clean=False)
                self._states = states
            except BaseException:
                cast("Directory", self.directory).settle(token)
                raise

    def close(self) -> None:
        """Write a checkpoint if anything was written since the last one, and let others open the directory.

        Afterwards this memory can be read, but not changed. Idempotent.

        Raises:
            MemoryFileError: the checkpoint cannot be written. The directory is closed, and nothing is lost: the
                journal has it.
        """
        if self.directory is None:
            return
        with self._write_lock:
            try:
                with self._state_lock:
                    self._settle_rest()
                if self.directory.journal_bytes and not self.directory.closed and self.directory.failed is None:
                    self.checkpoint()
            finally:
                self.directory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------ on the way to disk

    def _begin(self) -> None:
        self.check_writable()
        for store in self._mapped():
            store.changes = []
        self._draws = [generator.get_state() for generator in self.generators]

    def _tidy(self, states: list[StreamState], stayed: Stayed | None) -> None:
        if self._makes_checkpoint(stayed):
            states[:] = self._tidied(states)

    def _tidied(self, states: Sequence[StreamState]) -> tuple[StreamState, ...]:
        """``states`` as a checkpoint has them: without sources of which nothing is held."""
        views = map(StreamView, states, self._stores)
        return tuple(without_unused_sources(view).state for view in views)

    def _makes_checkpoint(self, stayed: Stayed | None) -> bool:
        return stayed is None or self._own_directory().in_earlier_version

    def _keep(self, after: tuple[StreamState, ...], stayed: Stayed | None) -> None:
        directory = self._own_directory()
        if stayed is None or self._makes_checkpoint(stayed):
            self._replace(after, after, clean=stayed is None)
            return
        draws = [generator.get_state() for generator in self.generators]
        moved = {row: draw for row, draw in enumerate(draws) if not torch.equal(draw, self._draws[row])}
        notes = [store.changes or () for store in self._mapped()]
        with writable(directory.path):
            directory.append(after, encode(self._states, after, stayed, notes, moved))

    def _settled(self, after: tuple[StreamState, ...]) -> bool:
        # Not checked: what was begun is taken back in the files that are open, whatever came between.
        return cast("Directory", self.directory).settle(after)

    def _replace(self, token: object, states: tuple[StreamState, ...], *, clean: bool) -> None:
        """A checkpoint of ``states``, and of stores and generators as they are."""
        directory = self._own_directory()
        draws = [generator.get_state() for generator in self.generators]
        indexes = [self.engine.mechanism.index_tensors(store) for store in self._stores]
        content = Content(list(states), list(self._stores), draws, self._usage, indexes)
        facts = Facts.of(self.engine, self.eviction, self.budget, states)
        with writable(directory.path):
            directory.checkpoint(token, content, facts, clean=clean)
        self._next_checkpoint = self.journal_bytes

    def _mapped(self) -> list[MmapStore]:
        return [innermost(store) for store in self._stores]

    def _own_directory(self) -> Directory:
        self.check_writable()
        return cast("Directory", self.directory)
