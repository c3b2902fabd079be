"""Plan a write: the texts for the streams of a memory, checked and cut into chunks or passages."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from attrs import define, evolve
from torch import Tensor

from mplus.errors import MechanismError, MemoryMismatchError
from mplus.memory.engine import Engine
from mplus.memory.recompute import refresh_if_stale
from mplus.memory.report import WriteReport
from mplus.memory.sources.expiry import expire
from mplus.memory.sources.source import SourceMarks
from mplus.memory.sources.writes import WriteRecord
from mplus.memory.state import StreamState, StreamView
from mplus.memory.transaction import Streams
from mplus.memory.weights_state import WeightsState
from mplus.memory.writing.chunking import (
    SourceNames,
    WriteData,
    check_vocabulary,
    cut_up,
    cut_with_tail,
    to_names,
    to_rows,
)
from mplus.memory.writing.passages import Passage, cut, to_texts, with_ids
from mplus.tokenizer import Tokenizer

if TYPE_CHECKING:
    from mplus.memory.memory import Memory


NOTHING: SourceMarks = {}


@define(frozen=True, eq=False)
class StreamWrite:
    """A stream, and the text to write to it.

    Attributes:
        streams: of the memory.
        row: the batch row of the stream.
        chunks: ids ``[n]`` of each chunk.
        name: of the source.
        report: of the memory; counts on.
        tokenizer: of the memory, if it has one.
        passages: the text of each chunk, where the memory is one of text.
        before: the passage in front of the first one.
        facts: fields of ``Source`` that the write sets besides counts and times, by name.
        record: of a write that was given an id, what earlier calls have written of it.
        begun: when this one began, by ``time.perf_counter``.
        texts: ids ``[n]`` of texts that are cut once the memory is locked, behind what waits of their source then.
        rest: ids ``[n]`` of what waits of the source once all chunks are written; the chunks begin with what waited
            before. None: what waits is let be.
        short: the only chunk is too short for one, and leaves a row for each of its tokens at most.
    """

    streams: Streams
    row: int
    chunks: Sequence[Tensor]
    name: str | None
    report: WriteReport
    tokenizer: Tokenizer | None = None
    passages: Sequence[str] = ()
    before: str = ""
    facts: SourceMarks = NOTHING
    record: WriteRecord | None = None
    begun: float = 0.0
    texts: Sequence[Tensor] = ()
    rest: Tensor | None = None
    short: bool = False

    @property
    def tokens(self) -> int:
        """Return how many tokens there are to write."""
        return sum(map(len, (*self.chunks, *self.texts)))

    def noted(
        self, state: StreamState, source: int, tokens: int, dropped: int = 0, evicted: int = 0, chunks: int = 0
    ) -> StreamState:
        """Return a state that has taken in more of this write, in which that is noted if it has an id.

        Args:
            state: after that.
            source: number of the source.
            tokens, dropped, evicted, chunks: of what was taken in, as in ``WriteReport``.
        """
        if self.record is None:
            return state
        before = state.writes.get(self.record.write_id) or evolve(self.record, source=source)
        after = evolve(
            before,
            tokens=before.tokens + tokens,
            chunks=before.chunks + chunks,
            dropped=before.dropped + dropped,
            evicted=before.evicted + evicted,
            seconds=self.record.seconds + time.perf_counter() - self.begun,
        )
        return evolve(state, writes=state.writes.noting([after]))

    def passage(self, step: int) -> Passage:
        """Return the text of one chunk, of a memory of text."""
        before = self.passages[step - 1] if step else self.before
        return Passage(self.passages[step], self.name, before, self.tokenizer)

    @property
    def view(self) -> StreamView:
        """The stream as a write sees it; no snapshot, since the memory's write lock is held."""
        streams, row = self.streams, self.row
        return StreamView(self.state, streams.stores[row], streams.access_logs[row])

    @property
    def state(self) -> StreamState:
        """The state of the stream, as it is written with the memory's tokenizer."""
        found: StreamState = self.streams.engine.mechanism.with_tokenizer(self.streams.states[self.row], self.tokenizer)
        return found

    def cut(self) -> StreamWrite:
        """Return this write with its texts cut into chunks; the caller holds the memory's write lock."""
        if not self.texts:
            return self
        config, shortest = self.streams.engine.config, self.streams.engine.mechanism.shortest_text
        sizes = {"chunk_tokens": config.chunk_tokens, "min_chunk_tokens": config.min_chunk_tokens}
        waiting = self.streams.states[self.row].waiting(self.name)
        chunks, rest = cut_with_tail(waiting, self.texts, shortest_text=shortest, **sizes)
        return evolve(self, texts=(), chunks=chunks, rest=rest)


def planned(
    memory: Memory,
    data: WriteData,
    source: SourceNames,
    report: WriteReport,
    facts: SourceMarks,
    now: WeightsState | None = None,
) -> list[StreamWrite]:
    """Check all that is to be written to a memory, and cut it into chunks, none of which spans two turns.

    Texts of which something may have to wait are cut later (``StreamWrite.cut``). ``facts``: of each ``StreamWrite``;
    ``now``: as for ``prepare_write``.
    """
    streams, tokenizer = memory.streams, memory.tokenizer
    names = to_names(source, len(streams))
    engine, config = streams.engine, streams.engine.config
    if engine.writes_text:
        texts = to_texts(data, len(streams), tokenizer)
        prepare_write(streams, [row for row, own in enumerate(texts) if own], now)
        parts = [[part for text in own for part in cut(text, tokenizer, config.chunk_tokens)] for own in texts]
        return [
            passage_write(streams, row, parts[row], names[row], report, tokenizer, facts=facts)
            for row in range(len(streams))
        ]
    rows = to_rows(data, len(streams), tokenizer)
    prepare_write(streams, [row for row, own in enumerate(rows) if own], now)
    writes = []
    for row, own in enumerate(rows):
        for ids in own:
            check_vocabulary(ids, engine.vocab_size)
        write = StreamWrite(streams, row, [], names[row], report, tokenizer, facts=facts)
        if engine.mechanism.shortest_text > 1:
            writes.append(evolve(write, texts=own))
        else:
            chunks = [chunk for ids in own for chunk in cut_ids(engine, ids, tokenizer)]
            writes.append(evolve(write, chunks=chunks))
    return writes


def cut_ids(engine: Engine, ids: Tensor, tokenizer: Tokenizer | None) -> list[Tensor]:
    """Return the chunks of a text ``[n]``, as the mechanism cuts it, or of one size, whatever is left over by itself.

    Raises MechanismError: the mechanism cuts it into something else.
    """
    mechanism, config = engine.mechanism, engine.config
    chunks: list[Tensor] | None = mechanism.chunks(ids, tokenizer)
    if chunks is None:
        chunks, rest = cut_up(ids, config.chunk_tokens, config.min_chunk_tokens)
        return [*chunks, rest] if len(rest) else chunks
    sizes = list(map(len, chunks))
    if not sizes or min(sizes) < 1 or max(sizes) > config.chunk_tokens or sum(sizes) != len(ids):
        raise MechanismError(
            f"the mechanism {mechanism.name!r}: chunks must cut {len(ids)} tokens into pieces of 1 to chunk_tokens "
            f"({config.chunk_tokens}), got pieces of {sizes}"
        )
    return chunks


def passage_write(
    streams: Streams,
    row: int,
    passages: Sequence[str],
    name: str | None,
    report: WriteReport,
    tokenizer: Tokenizer | None,
    before: str = "",
    facts: SourceMarks = NOTHING,
) -> StreamWrite:
    """Return what writes passages to a stream of a memory of text. Raises InputError: ids outside the vocabulary."""
    found = with_ids(passages, tokenizer)
    for _, ids in found:
        check_vocabulary(ids, streams.engine.vocab_size)
    chunks, texts = [ids for _, ids in found], [text for text, _ in found]
    return StreamWrite(streams, row, chunks, name, report, tokenizer, texts, before, facts)


def prepare_write(streams: Streams, rows: Sequence[int], now: WeightsState | None = None) -> None:
    """Check that a memory can be written to, and bring the streams ``rows`` in line with the decoder's weights.

    What has expired is forgotten before. ``now``: what the decoder computes with, where that was just looked at.

    Raises:
        LiveMemoryError: it cannot be changed.
        MemoryMismatchError: it has another dtype than the decoder, or keys and values made with other weights.
    """
    check_dtype(streams.dtype, streams.engine.dtype)
    streams.check_writable()
    expire(streams)
    now = streams.engine.weights() if now is None else now
    # Nearly every write is made with the weights of the last one: then nothing has to be compared layer by layer.
    if any(streams.states[row].weights != now for row in rows):
        refresh_if_stale(streams, now, writing=rows)


def check_dtype(memory: torch.dtype, model: torch.dtype) -> None:
    """Raise MemoryMismatchError unless a memory holds what its decoder computes in."""
    if memory != model:
        raise MemoryMismatchError(
            f"the memory holds {memory} and the model computes in {model}: use memory.to(dtype={model})"
        )
