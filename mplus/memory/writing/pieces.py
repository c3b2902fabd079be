"""Write a document that arrives in pieces: fetch and tokenise the next one while the last one is written."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from itertools import chain

import torch
from attrs import define, evolve, field
from torch import Tensor

from mplus.errors import InputError
from mplus.memory.engine import Engine
from mplus.memory.report import LONG, WriteReport, progress_bar
from mplus.memory.sources.expiry import facts_of
from mplus.memory.sources.source import SourceMarks
from mplus.memory.transaction import Streams
from mplus.memory.writing.chunking import NOTHING, Ids, check_vocabulary, cut_up, to_names, to_rows
from mplus.memory.writing.passages import PassageCutter, to_text
from mplus.memory.writing.passes import tail_write, write_streams
from mplus.memory.writing.plan import StreamWrite, cut_ids, passage_write, prepare_write
from mplus.tokenizer import Tokenizer


def write_pieces(
    streams: Streams,
    tokenizer: Tokenizer | None,
    pieces: Iterable[str | Ids],
    source: str | None,
    expires: datetime | timedelta | None,
    progress: bool | None,
) -> WriteReport:
    """Write a document that comes in pieces to a memory of one stream; see ``Memory.write_pieces``."""
    begun = time.perf_counter()
    _check(streams, pieces)
    (name,), facts = to_names(source, 1), facts_of(streams, expires)
    prepare_write(streams, [0])
    report = WriteReport.nothing(1)
    with streams.write_lock, progress_bar("writing", None, progress, steps=LONG) as advance:
        if streams.engine.writes_text:
            _write_texts(streams, tokenizer, pieces, name, facts, report, advance)
            return evolve(report, seconds=time.perf_counter() - begun)
        empty = StreamWrite(streams, 0, [], name, report, tokenizer, facts=facts)
        for write in _writes(empty, _ahead(tokenised(pieces, tokenizer, streams.engine.vocab_size))):
            write_streams([write], advance)
    return evolve(report, seconds=time.perf_counter() - begun)


def joined(streams: Streams, tokenizer: Tokenizer | None, pieces: Iterable[str | Ids]) -> str | Tensor:
    """Return all pieces of a document for a memory of one stream as one text, or one tensor of ids ``[n]`` int32.

    Raises InputError as ``write_pieces``.
    """
    _check(streams, pieces)
    if streams.engine.writes_text:
        return "".join(to_text(piece, tokenizer) or "" for piece in pieces)
    found = [ids.int() for ids in _ahead(tokenised(pieces, tokenizer, streams.engine.vocab_size))]
    return torch.cat([torch.empty(0, dtype=torch.int32), *found])


def _check(streams: Streams, pieces: object) -> None:
    """Raise InputError unless these can be the pieces of a document, and the memory has one stream."""
    if len(streams) != 1:
        raise InputError(
            f"write_pieces writes to one stream, and this memory has {len(streams)}: use memory.select([row]), "
            "or write with a text for each"
        )
    if isinstance(pieces, str | bytes | torch.Tensor) or not isinstance(pieces, Iterable):
        raise InputError(f"pieces must be an iterable of texts or ids, got {type(pieces).__name__}")


def _writes(empty: StreamWrite, texts: Iterator[Tensor]) -> Iterator[StreamWrite]:
    """Yield what is to be written of a document, as much as is certain once each of its ``texts`` has come.

    Together it is what ``write`` would make of the whole, behind what waits of the source. ``empty``: a write without
    chunks. Raises InputError: there is no text.
    """
    engine, shortest = empty.streams.engine, empty.streams.engine.mechanism.shortest_text
    beginning = _beginning(texts, shortest)
    if len(beginning) < shortest:
        yield evolve(empty, texts=[beginning]).cut()
        return
    waiting = empty.state.waiting(empty.name)
    if 1 < shortest <= len(waiting):
        yield tail_write(empty.streams, empty.row, empty.name, empty.report)
        waiting = waiting[:0]
    config = engine.config
    # Whether the mechanism cuts texts itself shows in any ids; what arrives bit by bit has to be cut as it would.
    own = engine.mechanism.chunks(torch.zeros(1, dtype=torch.int64), empty.tokenizer) is not None
    cutter = OwnCutter(engine, empty.tokenizer) if own else Cutter(config.chunk_tokens, config.min_chunk_tokens)
    for ids in chain([torch.cat([waiting, beginning])], texts):
        if chunks := cutter.cut(ids):
            yield evolve(empty, chunks=chunks, rest=ids[:0])
    chunks, rest = cutter.rest()
    alone = len(rest) and shortest == 1
    yield evolve(empty, chunks=[*chunks, rest] if alone else chunks, rest=rest[:0] if alone else rest)


def _beginning(texts: Iterator[Tensor], tokens: int) -> Tensor:
    """Return the first ``tokens`` tokens of a document or more, or all there are. Raises InputError: there are none."""
    found = torch.empty(0, dtype=torch.int64)
    while len(found) < tokens and (ids := next(texts, None)) is not None:
        found = torch.cat([found, ids])
    if not len(found):
        raise InputError(NOTHING)
    return found


def _write_texts(
    streams: Streams,
    tokenizer: Tokenizer | None,
    pieces: Iterable[str | Ids],
    name: str | None,
    facts: SourceMarks,
    report: WriteReport,
    advance: Callable[[int], None],
) -> None:
    """Write the pieces of a text to the stream of a memory of text."""
    cutter, before = PassageCutter(tokenizer, streams.engine.config.chunk_tokens), ""

    def parts() -> Iterator[list[str]]:
        for piece in pieces:
            yield cutter.add(to_text(piece, tokenizer) or "")
        yield cutter.rest()

    for passages in parts():
        write = passage_write(streams, 0, passages, name, report, tokenizer, before, facts)
        write_streams([write], advance)
        before = write.passages[-1] if write.passages else before


def tokenised(pieces: Iterable[str | Ids], tokenizer: Tokenizer | None, vocab_size: int) -> Iterator[Tensor]:
    """Yield ``[n]`` int64 ids of each piece that is not empty. Raises InputError as ``to_rows``, or by vocabulary."""
    for piece in pieces:
        if not isinstance(piece, str) or piece:
            (texts,) = to_rows(piece, 1, tokenizer)
            for ids in texts:
                check_vocabulary(ids, vocab_size)
                yield ids


@define(eq=False)
class OwnCutter:
    """A cutter of ids that arrive bit by bit, into the chunks that the mechanism cuts all of them into.

    Attributes:
        engine: whose mechanism cuts.
        tokenizer: of the memory.
        held: ids that may still be cut in more than one way.
    """

    engine: Engine
    tokenizer: Tokenizer | None
    held: Tensor = field(factory=lambda: torch.empty(0, dtype=torch.int64))

    def cut(self, ids: Tensor) -> list[Tensor]:
        """Return the chunks that are certain, whatever comes behind ``ids``."""
        held = torch.cat([self.held, ids])
        settled: list[Tensor] = []
        begin = 0
        for chunk in cut_ids(self.engine, held, self.tokenizer):
            if begin + self.engine.config.chunk_tokens >= len(held):
                break
            settled.append(chunk)
            begin += len(chunk)
        self.held = held[begin:].clone()
        return settled

    def rest(self) -> tuple[list[Tensor], Tensor]:
        """Return the last chunks, and ids that are left over: none."""
        chunks = cut_ids(self.engine, self.held, self.tokenizer) if len(self.held) else []
        return chunks, self.held[:0]


@define(eq=False)
class Cutter:
    """A cutter of ids that arrive bit by bit, into the chunks that ``cut_up`` cuts all of them into.

    Attributes:
        chunk_tokens, min_chunk_tokens: as for ``split``.
        held: ids that may still be cut in more than one way.
    """

    chunk_tokens: int
    min_chunk_tokens: int
    held: Tensor = field(factory=lambda: torch.empty(0, dtype=torch.int64))

    def cut(self, ids: Tensor) -> list[Tensor]:
        """Return the chunks that are certain, whatever comes behind ``ids``."""
        held = torch.cat([self.held, ids])
        spare = self.chunk_tokens - self.min_chunk_tokens
        # ``split`` fills a last chunk that is too short from its neighbours, each of which can spare so many tokens:
        # as many neighbours as that may take are held back. Where chunks have no tokens to spare, none are.
        givers = -(-(self.min_chunk_tokens - 1) // spare) if spare else 0
        settled = max(0, (len(held) - 1) // self.chunk_tokens - givers)
        chunks = list(held[: settled * self.chunk_tokens].split(self.chunk_tokens)) if settled else []
        self.held = held[settled * self.chunk_tokens :].clone()
        return chunks

    def rest(self) -> tuple[list[Tensor], Tensor]:
        """Return the last chunks, and the ids that are left over."""
        return cut_up(self.held, self.chunk_tokens, self.min_chunk_tokens)


def _ahead(items: Iterator[Tensor]) -> Iterator[Tensor]:
    """Yield the same items, each made in another thread while its predecessor is in use."""
    with ThreadPoolExecutor(1, thread_name_prefix="mplus-tokenise") as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item
