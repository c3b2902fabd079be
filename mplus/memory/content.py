"""MemoryContent: what a memory holds, for all that only look at it."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import TracebackType
from typing import Self
from weakref import WeakSet

import torch
from attrs import evolve

from mplus.errors import InputError
from mplus.memory.copying import check_row
from mplus.memory.engine import Engine
from mplus.memory.report import SourceInfo, describe
from mplus.memory.sources.forget import forgotten_names
from mplus.memory.sources.found import FoundText
from mplus.memory.sources.listing import sources_of
from mplus.memory.sources.text import text_of_source
from mplus.memory.state import StreamState, StreamView
from mplus.memory.transaction import Streams
from mplus.stores.base import MemoryStore
from mplus.stores.disk.locks import ProcessLock
from mplus.stores.mmap import bytes_in_files
from mplus.stores.sharing import distinct
from mplus.tokenizer import Tokenizer


class Lease:
    """A read of a memory that is under way; a context manager, which ends with its block or its last reference."""

    def __init__(self, ended: Callable[[Lease], None]) -> None:
        self._ended = ended
        self.process = os.getpid()

    def close(self) -> None:
        """End it; idempotent."""
        self._ended(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class MemoryContent:
    """The content of a memory, which none of these methods changes.

    Attributes:
        streams: the content, on which the parts of mplus that write, save and forget work.
        tokenizer: turns texts into ids for ``write``; may be None.
    """

    def __init__(self, streams: Streams, tokenizer: Tokenizer | None = None) -> None:
        self.streams = streams
        self.tokenizer = tokenizer
        self._leases = WeakSet[Lease]()  # weak: an interrupt between two lines leaves none behind
        self._lease_lock = ProcessLock()

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
    def ram_bytes(self) -> int:
        """Bytes of all rows that are not in files: ``nbytes`` without mapped files, which the system may drop."""
        return self.nbytes - sum(bytes_in_files(store) for store in distinct(self.stores))

    def lease(self) -> Lease:
        """Say that a read begins, which ends with the block: until then the memory is ``busy``.

        For programs that keep many memories open and close those that nothing uses. Reads are right without it, also
        where the memory is closed, forgets, or is deleted meanwhile: they hold what they read.

        Example:
            >>> with memory.lease():
            ...     answer = model.generate(**question, memory=memory, max_new_tokens=8)
            >>> memory.busy
            False
        """
        lease = Lease(self._end)
        with self._lease_lock.here():
            self._leases.add(lease)
        return lease

    def _end(self, lease: Lease) -> None:
        with self._lease_lock.here():
            self._leases.discard(lease)

    @property
    def busy(self) -> bool:
        """True while a read has a lease, or another thread changes the memory: it is not the time to close it."""
        with self._lease_lock.here():
            if any(lease.process == os.getpid() for lease in self._leases):
                return True
        return self.streams.is_changed_elsewhere

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

    def search(self, text: str, k: int = 5, row: int = 0) -> list[FoundText]:
        """Return what a question would bring back from batch row ``row``, the best first; nothing is generated.

        Reads that ask with the same words get it in as far as it has room there.

        Args:
            text: the question alone, without a template.
            k: at most so many.
            row: batch row.

        Raises:
            InputError: no question, no such batch row, or the memory has no tokenizer.
            NotSupported: this mechanism chooses single rows, layer by layer, by a whole prompt (M+).
        """
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"search takes a text that is not empty, got {text!r:.80}")
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise InputError(f"k must be a whole number of at least 1, got {k!r}")
        view = self.snapshot()[check_row(row, self.batch_size)]
        return self.engine.search(evolve(view, access_log=None), text, k, self.tokenizer)

    def text(self, source: str | None, row: int = 0) -> str:
        """Return what was written from a source to batch row ``row`` and is held, where its words or ids are kept.

        Those are kept by memories of keys and values, by memories of text (whose entries come a line each), and by all
        that are made with ``keep_text=True``.

        Raises:
            InputError: the stream has no such source, there is no such row, or the memory has no tokenizer.
            NotSupported: the memory keeps neither words nor ids.
        """
        return text_of_source(self.states[check_row(row, self.batch_size)], source, self.tokenizer)

    def forgotten(self, row: int = 0) -> list[str | None]:
        """List names of sources of batch row ``row`` that ``forget(keep_name=True)`` left nothing of but the name.

        A name that is written again is no longer among them. Raises InputError: there is no such batch row.
        """
        return forgotten_names(self.states[check_row(row, self.batch_size)])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({describe(self.streams)})"
