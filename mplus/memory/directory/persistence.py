"""DirectoryPersistence: puts a memory's writes into a journal, and all other changes into checkpoints."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from mplus.errors import LiveMemoryError, MemoryFileError
from mplus.memory.directory.checkpoint import CheckpointContent
from mplus.memory.directory.directory import Directory
from mplus.memory.directory.record import encode
from mplus.memory.format.save import ManifestHeader
from mplus.memory.sources.forget import without_unused_sources
from mplus.memory.state import StreamState, StreamView
from mplus.memory.transaction import KeptPositions, Persistence, Streams, Sync, Token
from mplus.stores.disk.files import writable
from mplus.stores.mmap import MmapStore, mapped_store


class ReadOnly(Persistence):
    """The persistence of a memory whose directory was opened for reading: refuses every change."""

    def __init__(self, where: str) -> None:
        """``where``: the directory, in messages."""
        self._where = where

    def check_writable(self) -> None:
        """Raise LiveMemoryError."""
        raise LiveMemoryError(f"{self._where} was opened with read_only=True: open it for writing")

    def begin(self, streams: Streams) -> None:
        """Raise LiveMemoryError."""
        self.check_writable()

    def check_removed(self) -> None:
        """Raise LiveMemoryError."""
        self.check_writable()


class DirectoryPersistence(Persistence):
    """The persistence of a memory that lives in a directory: what was written is on disk before it shows in memory.

    A write appends a record to the journal; every other change writes a checkpoint, without the rows that are gone.

    Attributes:
        directory: its files.
        journal_bytes: a new checkpoint is written when the journal is longer than this.
    """

    directory: Directory
    journal_bytes: int

    def __init__(self, directory: Directory, journal_bytes: int) -> None:
        self.directory = directory
        self.journal_bytes = journal_bytes
        self._next_checkpoint = journal_bytes
        self._draws: list[Tensor] = []
        # A memory that nobody refers to any more gives its lock back, also where nobody closed it.
        self._finalizer = weakref.finalize(self, Directory.close, directory)

    def check_writable(self) -> None:
        """Raise LiveMemoryError where nothing can be written."""
        self.directory.check()

    def begin(self, streams: Streams) -> None:
        """Note from now on what is done to the stores, and how far the generators were."""
        self.check_writable()
        for store in _mapped(streams):
            store.changes = []
        self._draws = streams.draws()

    def tidy(self, states: list[StreamState], streams: Streams, kept: KeptPositions | None) -> None:
        """Drop sources of which nothing is held, where the change will be a checkpoint."""
        if self._makes_checkpoint(kept):
            views = map(StreamView, states, streams.stores)
            states[:] = [without_unused_sources(view).state for view in views]

    def _makes_checkpoint(self, kept: KeptPositions | None) -> bool:
        return kept is None or self.directory.in_earlier_version

    def commit(
        self, after: tuple[StreamState, ...], streams: Streams, kept: KeptPositions | None, sync: Sync | None = None
    ) -> None:
        """Append a record of a write to the journal; write a checkpoint for any other change."""
        if kept is None or self._makes_checkpoint(kept):
            self._write_checkpoint(after, after, streams, clean=kept is None)
            return
        # Generators are in the record where they have moved: replayed, the next write draws as it would have.
        draws = enumerate(zip(self._draws, streams.draws(), strict=True))
        moved = {row: now for row, (before, now) in draws if not torch.equal(before, now)}
        notes = [store.changes or () for store in _mapped(streams)]
        with writable(self.directory.path):
            self.directory.append(after, encode(streams.states, after, kept, notes, moved), sync)

    def checkpoint(self, token: Token, states: Sequence[StreamState], streams: Streams) -> None:
        """Write a checkpoint of ``states``; files that hold removed rows among others stay as they are."""
        self._write_checkpoint(token, states, streams, clean=False)

    def _write_checkpoint(self, token: Token, states: Sequence[StreamState], streams: Streams, *, clean: bool) -> None:
        indexes = [streams.engine.mechanism.index_tensors(store) for store in streams.stores]
        content = CheckpointContent(list(states), list(streams.stores), streams.draws(), streams.access_logs, indexes)
        header = ManifestHeader.of(streams.engine, streams.eviction, streams.budget, states)
        with writable(self.directory.path):
            self.directory.checkpoint(token, content, header, clean=clean)
        self._next_checkpoint = self.journal_bytes

    def committed(self, token: Token) -> bool:
        """Return whether the change that makes ``token`` is on disk; one that was only begun is taken back."""
        # Not checked: what was begun is taken back in the files that are open, whatever came between.
        return self.directory.resolve(token)

    def after_write(self, streams: Streams) -> None:
        """Write a checkpoint where the journal has become long."""
        streams.check_writable()
        size = self.directory.journal_bytes
        if size > self._next_checkpoint:
            try:
                streams.checkpoint()
            except MemoryFileError as error:  # the chunk is on disk all the same
                self._next_checkpoint = 2 * size
                warnings.warn(
                    f"the journal goes on growing, since no checkpoint could be written: {error}", stacklevel=3
                )

    def check_removed(self) -> None:
        """Raise MemoryFileError where a file may still hold what was removed."""
        self.check_writable()
        self.directory.check_removed()

    @property
    def is_open(self) -> bool:
        """True until the directory is closed, or has failed."""
        return not self.directory.closed and self.directory.failed is None

    @property
    def has_journal(self) -> bool:
        """True if something was written since the last checkpoint, and a checkpoint can be."""
        return bool(self.directory.journal_bytes) and self.is_open

    def close(self) -> None:
        """Release files and lock; idempotent."""
        self.directory.close()


def _mapped(streams: Streams) -> list[MmapStore]:
    return [mapped_store(store) for store in streams.stores]
