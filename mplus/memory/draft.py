"""Draft: a copy of the streams of a memory on which several changes are made, to come to be as a single one."""

from __future__ import annotations

from mplus.memory.copying import copied
from mplus.memory.state import StreamState
from mplus.memory.transaction import Streams, Sync
from mplus.stores.base import parts_of
from mplus.stores.sharing import distinct


def draft_of(streams: Streams) -> Streams:
    """Return an independent copy of all streams, kept in memory only; the caller holds their write lock.

    Where the memory lives in a directory, its stores note what is done to them, as those of the memory do.
    """
    draft = copied(streams, range(len(streams)))
    if streams.persistence.directory is not None:
        from mplus.stores.mmap import mapped_store

        for store in draft.stores:
            mapped_store(store).changes = []
    return draft


def adopt_draft(streams: Streams, draft: Streams, *, removed: bool, sync: Sync | None = None) -> None:
    """Let streams become what their draft is, as one change, which a crash leaves made or not made at all.

    Args:
        streams: not changed since the draft was taken.
        draft: not used any more.
        removed: whether something was removed for good: a directory then rewrites the files that held it. Otherwise the
            change is a record in its journal, if it is not too long for one.
        sync: as for ``Persistence.commit``.

    Raises:
        LiveMemoryError, MemoryFileError: the change cannot be kept; all is as before.
    """

    def become(states: list[StreamState]) -> None:
        states[:] = draft.states
        for own, new in zip(streams.stores, draft.stores, strict=True):
            for part, successor in zip(parts_of(own), parts_of(new), strict=True):
                successor.identity = part.identity  # of whom it goes on where that one was: an index stays in use
        streams.adopt(draft)

    grown, limit = draft.nbytes - streams.nbytes, streams.persistence.journal_bytes
    checkpoint = removed or (limit is not None and grown > limit)
    streams.change(become, None if checkpoint else {}, sync)
    if removed:
        for store in distinct(streams.stores):
            streams.engine.mechanism.sync_index(store)
    streams.persistence.after_write(streams)
