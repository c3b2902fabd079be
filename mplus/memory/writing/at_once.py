"""Writes that come to be as one change: a whole text or none of it, alone or in the place of another."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING

from attrs import evolve

from mplus.memory.draft import adopt_draft, draft_of
from mplus.memory.report import WriteReport, progress_bar
from mplus.memory.sources.expiry import facts_of
from mplus.memory.sources.forget import drop_source
from mplus.memory.sources.source import SourceMarks
from mplus.memory.transaction import Streams, Sync
from mplus.memory.writing.chunking import SourceNames, WriteData
from mplus.memory.writing.commit import SYNC_THREADS, commit_together
from mplus.memory.writing.once import report_of, resumed
from mplus.memory.writing.passes import write_all, write_streams
from mplus.memory.writing.plan import NOTHING, StreamWrite, planned

if TYPE_CHECKING:
    from mplus.memory.memory import Memory


def write_at_once(
    streams: Streams, writes: Sequence[StreamWrite], advance: Callable[[int], None], *, replaced: bool = False
) -> None:
    """Write all chunks to streams of one memory as one change; the caller holds the write lock.

    Args:
        streams: of the memory; reads see them as they were until all is written.
        writes: of these streams.
        advance: called with the tokens of each chunk.
        replaced: forget in the same change what was written under the names before; what was said of these sources,
            that they are pinned and when they expire, holds on.

    Raises as ``Memory.write``; then nothing was written and nothing forgotten.
    """
    draft = draft_of(streams)
    anew = [evolve(write, streams=draft, facts=_facts(write, replaced=replaced)) for write in writes]
    for write in writes if replaced else ():
        if (write.chunks or write.texts) and streams.states[write.row].sources.find(write.name) is not None:
            drop_source(draft, [write.row], write.name, keep_name=False)
    write_streams([write.cut() for write in anew], advance)
    adopt_draft(streams, draft, removed=replaced)


def write_all_at_once(writes: Sequence[StreamWrite], advance: Callable[[int], None]) -> dict[int, Exception]:
    """Write all chunks to streams of several memories, as one change of each; the caller holds the write locks.

    Returns:
        What failed, by id of the memory's ``Streams``, which is as it was before.
    """
    memories = {id(write.streams): write.streams for write in writes}
    drafts = {key: draft_of(streams) for key, streams in memories.items()}
    anew = [evolve(write, streams=drafts[id(write.streams)]) for write in writes]
    unwritten = write_all([write.cut() for write in anew], advance)
    failed = {key: unwritten[id(draft)] for key, draft in drafts.items() if id(draft) in unwritten}
    changes = {key: partial(_adopt, streams, drafts[key]) for key, streams in memories.items() if key not in failed}
    with ThreadPoolExecutor(SYNC_THREADS, "mplus-sync") as pool:
        return failed | commit_together(changes, pool)


def _adopt(streams: Streams, draft: Streams, sync: Sync) -> None:
    adopt_draft(streams, draft, removed=False, sync=sync)


def _facts(write: StreamWrite, *, replaced: bool) -> SourceMarks:
    sources = write.streams.states[write.row].sources
    number = sources.find(write.name) if replaced else None
    kept: SourceMarks = {} if number is None else {"pinned": sources[number].pinned, "expires": sources[number].expires}
    return {**kept, **write.facts}


def write_whole(
    memory: Memory,
    data: WriteData,
    source: SourceNames,
    *,
    expires: datetime | timedelta | None,
    progress: bool | None,
    write_id: str | None = None,
    atomic: bool = False,
    replaced: bool = False,
) -> WriteReport:
    """Write a text to one memory wholly; see ``Memory.write`` (``write_id``, ``atomic``) and ``Memory.replace``."""
    begun, streams = time.perf_counter(), memory.streams
    report = WriteReport.nothing(len(streams))
    with streams.write_lock:
        writes = planned(memory, data, source, report, NOTHING)
        rows = [write.row for write in writes if write.tokens]
        if write_id is not None:
            writes = [resumed(write, write_id, begun) for write in writes]
        total = sum(write.tokens for write in writes)
        if total:
            facts = facts_of(streams, expires)
            writes = [evolve(write, facts=facts) for write in writes]
            steps = total // streams.engine.config.chunk_tokens
            with progress_bar("replacing" if replaced else "writing", total, progress, steps=steps) as advance:
                if atomic or replaced:
                    write_at_once(streams, writes, advance, replaced=replaced)
                else:
                    write_streams([write.cut() for write in writes], advance)
        if replaced:
            streams.persistence.check_removed()
        if write_id is not None:
            return report_of(streams.states, write_id, rows)
    return evolve(report, seconds=time.perf_counter() - begun)
