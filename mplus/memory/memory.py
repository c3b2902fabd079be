"""Memory: what one conversation, user or book has left in a decoder; one stream per batch row."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any, Literal, NoReturn, SupportsIndex, cast

import torch
from torch import Tensor, nn

from mplus.errors import InputError
from mplus.memory.copying import check_row, check_rows, check_target, copied, moved, pickle_error
from mplus.memory.merging.merge import merge
from mplus.memory.report import ForgetReport, MergeReport, WriteReport
from mplus.memory.rewriting import rewrite
from mplus.memory.sources.clock import seconds_of
from mplus.memory.sources.expiry import expire, pin
from mplus.memory.sources.forget import drop_source
from mplus.memory.sources.rebuild import rebuild_without, reset
from mplus.memory.stored import StoredMemory
from mplus.memory.writing.at_once import write_whole
from mplus.memory.writing.chunking import Ids, SourceNames, WriteData
from mplus.memory.writing.pieces import joined, write_pieces
from mplus.memory.writing.write import write, write_chunk


class Memory(StoredMemory):
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

    # ------------------------------------------------------------------ writing

    def write(
        self,
        data: WriteData,
        source: SourceNames = None,
        *,
        expires: datetime | timedelta | None = None,
        write_id: str | None = None,
        atomic: bool = False,
        progress: bool | None = None,
    ) -> WriteReport:
        """Read text into memory, chunk by chunk; an error or interrupt leaves the chunks before it, and nothing else.

        Where a mechanism makes rows of whole chunks, text that is too short for one waits for more of its source
        (``flush`` writes it) and is read as it is, in front of the prompt.

        Args:
            data: a text; ids ``[n]`` or ``[B, n]``; a list of chat messages, ``{"role": ..., "content": ...}``, each of
                which is written as a text of its own, with its speaker in front; what ``apply_chat_template`` returns;
                or a list with one of these or None (skip) per batch row.
            source: name that ``sources``, ``forget`` and retrieval reports use; one, or one per batch row.
            expires: when all of the source is forgotten (see ``expire``), as a time with a timezone or from now on;
                None: as it was said before, and of a new source never.
            write_id: what you call this write, in every batch row. Writing the same text under the same id once more,
                also after a crash, writes what is still missing, from the next chunk on; where nothing is, it changes
                nothing. The report is that of the whole. Ids are forgotten with their source.
            atomic: leave nothing of a write that does not come to its end, be it by an error, an interrupt or a crash.
                Reads see none of it before, and its rows stay in RAM until then.
            progress: show a progress bar; None: for long writes in a terminal.

        Raises:
            InputError: wrong batch size, ids outside the vocabulary, no text at all, a time that has
                passed, or another text under a known ``write_id``; nothing was written.
            MemoryFullError: pinned sources leave no room for another chunk; or so much RAM or disk is not free, where
                the system tells what is. Nothing was written.
            MemoryMismatchError: the decoder's dtype is not that of the memory; or rows are kept as keys and values
                only, and were made with other adapters or weights.
            NonFiniteError: the decoder gave NaN or Inf for a chunk, which was not written.
        """
        if atomic or write_id is not None:
            return write_whole(self, data, source, expires=expires, progress=progress, write_id=write_id, atomic=atomic)
        return write(self, data, source, expires, progress)

    def write_pieces(
        self,
        pieces: Iterable[str | Ids],
        source: str | None = None,
        *,
        expires: datetime | timedelta | None = None,
        write_id: str | None = None,
        atomic: bool = False,
        progress: bool | None = None,
    ) -> WriteReport:
        """Read a long document that comes in pieces, say the lines of a file, without ever holding all of it.

        Another thread fetches and tokenises the next piece meanwhile. Chunks are cut as ``write`` cuts a whole text.

        Args:
            pieces: texts or ids ``[n]``, in order; empty ones are skipped. For a memory of one batch row.
            source: name of the document.
            expires: as for ``write``.
            write_id, atomic: as for ``write``. All pieces are fetched before the first chunk is written, and held as
                ids, 4 bytes a token, since a text is known again by all of it.
            progress: show a progress bar; None: in a terminal.

        Raises:
            InputError, MemoryMismatchError, NonFiniteError: as ``write``; and what ``pieces`` itself raises. The chunks
                written until then are kept.
        """
        if atomic or write_id is not None:
            whole = joined(self.streams, self.tokenizer, pieces)
            return write_whole(
                self, whole, source, expires=expires, progress=progress, write_id=write_id, atomic=atomic
            )
        return write_pieces(self.streams, self.tokenizer, pieces, source, expires, progress)

    def write_chunk(self, ids: Tensor, source: str | None = None) -> WriteReport:
        """Write one chunk ``[B, n]`` to every stream in one pass, without splitting.

        Raises as ``write``; InputError also where n is not in ``min_chunk_tokens`` .. ``chunk_tokens``.
        """
        return write_chunk(self.streams, ids, source, self.tokenizer)

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
        rows = self._rows(row)
        if mode not in ("drop", "rebuild"):
            raise InputError(f"mode must be 'drop' or 'rebuild', got {mode!r}")
        with self.streams.write_lock:
            if mode == "drop":
                report = drop_source(self.streams, rows, source, keep_name=keep_name)
            else:
                report = rebuild_without(self.streams, rows, source, keep_name=keep_name, progress=progress)
            self.streams.persistence.check_removed()
        return report

    def expire(self, now: datetime | None = None) -> list[ForgetReport]:
        """Forget, as one change, every source whose time (``write(..., expires=)``) has come.

        Opening, loading and every write do it before anything else. Reading never changes a memory: a source that
        expires while nothing is written is read until ``expire`` is called. Pinned sources expire as others do.

        Args:
            now: a time with a timezone; None: by the clock of the memory.

        Returns:
            What was forgotten, a report for each source, as ``forget`` gives it.

        Raises:
            InputError: the time has no timezone.
            MemoryFileError: as ``forget``.
        """
        return expire(self.streams, None if now is None else seconds_of(now, "now"))

    def pin(self, source: str | None, row: int | None = None) -> None:
        """Keep the rows of a source (in batch row ``row``, or in all) from eviction, also those written later.

        They count to the capacity; others leave in their place. ``forget`` and ``expire`` remove them as ever.

        Raises:
            InputError: no stream has this source, or there is no such row.
            NotSupported: rows of this mechanism leave at random, so that none can be kept.
        """
        pin(self.streams, self._rows(row), source, pinned=True)

    def unpin(self, source: str | None, row: int | None = None) -> None:
        """Let the rows of a source leave again as the eviction policy says. Raises InputError as ``pin``."""
        pin(self.streams, self._rows(row), source, pinned=False)

    def _rows(self, row: int | None) -> Sequence[int]:
        return range(self.batch_size) if row is None else [check_row(row, self.batch_size)]

    def replace(
        self,
        source: str | None,
        data: WriteData,
        row: int | None = None,
        *,
        expires: datetime | timedelta | None = None,
        progress: bool | None = None,
    ) -> WriteReport:
        """Forget a source and write another text under its name, as one change: never are both there, or neither.

        Reads see what was there until all is written. A source that is not there is written all the same. One that is
        pinned stays so, and it expires when it would have, unless ``expires`` says otherwise.

        Args:
            source: its name.
            data: as for ``write``; a batch row without a text stays as it is.
            row: the batch row, for which ``data`` is one text; None: all, as for ``write``.
            expires, progress: as for ``write``.

        Raises as ``write``; nothing was written then, and nothing forgotten. MemoryFileError also as ``forget``.
        """
        if row is not None:
            own = check_row(row, self.batch_size)
            data = [cast("Any", data) if place == own else None for place in range(self.batch_size)]
        return write_whole(self, data, source, expires=expires, progress=progress, replaced=True)

    def rewrite(self, model: nn.Module | None = None, *, progress: bool | None = None) -> WriteReport:
        """Compute all rows anew from the ids that the memory keeps, with the weights as they are now, as one change.

        For a memory that is refused because weights or adapters have changed since it was written, or that is to go
        on with a fine-tuned version of its decoder. Sources, times and what was forgotten stay as they are. It takes
        as long as writing did, and room for a second memory; reads of another thread see the rows there were.

        Args:
            model: a decoder of the same architecture and dtype, wrapped for the same mechanism, whose memory it
                becomes; None: the one it belongs to.
            progress: as for ``write``.

        Raises:
            InputError: the memory keeps no ids: all memories of the mechanism ``kv`` do, others with
                ``new_memory(keep_text=True)``; or it has no tokenizer, and what chunks are found by needs one.
            MemoryMismatchError: the decoder makes other rows.
            NonFiniteError: as ``write``. Nothing was changed in any of these cases.

        Example:
            >>> memory.rewrite(tuned)  # doctest: +SKIP
        """
        with self.streams.write_lock:
            return rewrite(self.streams, model, self.tokenizer, progress)

    def merge(self, other: Memory, *, sources: Literal["join", "rename", "refuse"] = "join") -> MergeReport:
        """Take all that another memory of this decoder holds into this one, as one change; the other stays as it is.

        Sources come with their names, times, expiry and pins, kept texts, ids of writes, and rows. What both have
        written stands in one order: by the time at which a source was written, where that is known of all (a source
        that was written before another one goes before it, and stays together); else the other memory's comes last.
        No pass is run, but for text that waits and makes up a chunk now. Of more rows than there may be, some leave as
        they do at a write: from the STM by the option ``drop``, from the LTM by the eviction policy.

        A memory of the mechanism ``kv``, or of text, is afterwards the one that had been written both texts. In M+ and
        MemoryLLM a chunk reads the rows before it when it is written, and those stay what they were; to have them
        written one behind the other, merge memories that keep their texts, and ``rewrite`` the one that comes of it.
        A fork holds what its origin holds: merged, both of it are there.

        Args:
            other: a memory of the same decoder, batch size and dtype, which keeps the same of its rows.
            sources: what becomes of sources of one name: "join" makes one of them, as writing under one name does,
                which expires with the earlier of the two; "rename" gives the other memory's a new name, "mail (2)", say
                (text without a name is joined); "refuse" raises InputError. Where both have given one ``write_id``,
                that of this memory holds on.

        Returns:
            What was taken in, and under which names.

        Raises:
            InputError: it is this memory itself, or none; or ``sources`` is something else, or refuses.
            MemoryMismatchError: another decoder, batch size, dtype or form of rows; or this memory keeps texts, and the
                other one does not.
            MemoryFullError: pinned sources leave no room for what is to come in.
            NotSupported: the mechanism does not say how two of its memories become one. Nothing was changed.

        Example:
            >>> memory.merge(other, sources="rename").sources  # doctest: +SKIP
            [{'mail': 'mail (2)', 'notes': 'notes'}]
        """
        return merge(self.streams, self.tokenizer, other, sources)

    def reset(self) -> None:
        """Become a new memory, all names forgotten; the generators go on. Raises MemoryFileError as ``forget``."""
        with self.streams.write_lock:
            reset(self.streams)
            self.streams.persistence.check_removed()

    def fork(self, row: int | None = None) -> Memory:
        """Return an independent memory with the same content and future draws; of one batch row, or of all."""
        rows = self._rows(row)
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
