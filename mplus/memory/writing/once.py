"""Writes that are made once: under an id, by which the same one is known again."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from itertools import accumulate

import torch
from attrs import evolve

from mplus.errors import InputError
from mplus.memory.report import WriteReport
from mplus.memory.sources.writes import WriteRecord
from mplus.memory.state import StreamState
from mplus.memory.writing.plan import StreamWrite, cut_ids


def resumed(write: StreamWrite, write_id: str, begun: float) -> StreamWrite:
    """Return what is left to do of a write that has an id, which notes what it does; the caller holds the write lock.

    Args:
        write: all of it.
        write_id: what the caller calls it.
        begun: when this call began, by ``time.perf_counter``.

    Raises:
        InputError: the id is none, or another text was written under it, or to another source.
    """
    if not isinstance(write_id, str) or not write_id:
        raise InputError(f"write_id must be a text that is not empty, got {write_id!r}")
    if not write.tokens:
        return write
    state = write.streams.states[write.row]
    digest, total = _digest(write), write.tokens
    known = state.writes.get(write_id)
    if known is None:
        new = WriteRecord(write_id=write_id, source=0, digest=digest, total=total)
        return evolve(write, record=new, begun=begun)
    if known.digest != digest or state.sources[known.source].name != write.name:
        raise InputError(
            f"the write_id {write_id!r} was given to another text, or to one of another source "
            f"({state.sources[known.source].name!r}, batch row {write.row}): every text needs an id of its own"
        )
    return evolve(_rest(write, known.tokens, known.chunks), record=known, begun=begun)


def _rest(write: StreamWrite, tokens: int, chunks: int) -> StreamWrite:
    """Return a write without its first ``tokens`` tokens, which were written in so many chunks."""
    if write.texts:
        ends = accumulate(map(len, write.texts))
        parts = [ids[max(len(ids) - max(end - tokens, 0), 0) :] for ids, end in zip(write.texts, ends, strict=True)]
        return evolve(write, texts=[ids for ids in parts if len(ids)])
    if sum(map(len, write.chunks[:chunks])) == tokens:
        texts = write.passages
        before = texts[chunks - 1] if texts and chunks else write.before
        return evolve(write, chunks=write.chunks[chunks:], passages=texts[chunks:], before=before)
    if write.passages:
        raise InputError(
            f"the first {tokens} tokens of this text were written in passages of another size: open the memory with "
            "chunk_tokens of then to write what is left"
        )
    left = torch.cat(list(write.chunks))[tokens:]
    return evolve(write, chunks=cut_ids(write.streams.engine, left, write.tokenizer))


def _digest(write: StreamWrite) -> bytes:
    """Return the SHA-256 of a text, however it is cut."""
    if write.passages:
        return hashlib.sha256("".join(write.passages).encode("utf-8", "surrogatepass")).digest()
    return hashlib.sha256(torch.cat(list(write.texts or write.chunks)).cpu().contiguous().numpy().tobytes()).digest()


def report_of(states: Sequence[StreamState], write_id: str, rows: Collection[int]) -> WriteReport:
    """Return what was written under an id to the batch rows ``rows``, in all calls together."""
    report, seconds = WriteReport.nothing(len(states)), 0.0
    for row in rows:
        record = states[row].writes.get(write_id)
        if record is not None:
            report.tokens[row], report.chunks[row] = record.tokens, record.chunks
            report.dropped_rows[row], report.evicted_rows[row] = record.dropped, record.evicted
            report.tail_tokens[row] = len(states[row].waiting(states[row].sources[record.source].name))
            seconds = max(seconds, record.seconds)
    return evolve(report, seconds=seconds)
