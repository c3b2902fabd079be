"""Units: the texts of a memory, each of which is written anew as a whole."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise

import torch
from attrs import define, evolve
from torch import Tensor

from mplus.errors import InputError
from mplus.memory.sources.rebuild import marks_of
from mplus.memory.sources.source import Source, SourceMarks
from mplus.memory.sources.writes import WriteRecord
from mplus.memory.state import StreamState
from mplus.tokenizer import Tokenizer

WRITE_ID = "mplus.rewrite_memory:"
"""Begins the ids of the writes by which a memory is made anew, as long as that lasts."""
SHORT = 24
"""Tokens that a chunk which was cut from a longer text has at least."""
SENTENCE_END = re.compile(r"([.!?…。！？][\"'”’)\]»]*|\n)\s*$")


@define(frozen=True, eq=False)
class Unit:
    """A text that was written to a stream, or as much of one as lies together.

    Attributes:
        row: the batch row of the stream.
        source: of the text.
        chunks: ids ``[n]`` int64 that it was cut into, where they are written as they are.
        text: the words that are written elsewhere; None: the chunks are.
        short: the only chunk is too short for one (see ``mplus.memory.texts.Text``).
        waits: the chunk waited for more.
        record: the user's own write that it is all of.
        write_id: of the write that makes it anew.
    """

    row: int
    source: Source
    chunks: Sequence[Tensor] = ()
    text: str | None = None
    short: bool = False
    waits: bool = False
    record: WriteRecord | None = None
    write_id: str = ""

    @property
    def facts(self) -> SourceMarks:
        """Fields of its source that stay what they were."""
        return marks_of(self.source)

    @property
    def content(self) -> bytes:
        """The bytes by which it is known again."""
        parts = [ids.numpy().tobytes() for ids in self.chunks]
        return b"".join(
            [repr((self.row, self.source.name)).encode(), *parts, (self.text or "").encode(errors="replace")]
        )


@define(frozen=True, eq=False)
class Piece:
    """Ids that lie together in a stream.

    Attributes:
        source: number of their source.
        ids: ``[n]`` int64.
        short, waits: as of ``Unit``.
    """

    source: int
    ids: Tensor
    short: bool = False
    waits: bool = False


def with_ids(units: Iterable[Unit], salt: str) -> list[Unit]:
    """Return units with a ``write_id`` each, the same for the same texts and ``salt``."""
    seen: dict[str, int] = defaultdict(int)
    found = []
    for unit in units:
        digest = hashlib.sha256(salt.encode() + unit.content).hexdigest()[:40]
        seen[digest] += 1
        found.append(evolve(unit, write_id=f"{WRITE_ID}{digest}.{seen[digest]}"))
    return found


def kept_units(row: int, state: StreamState, due: float) -> Iterator[Unit]:
    """Yield what a stream holds by the ids of its chunks, those of one source together that lie together.

    Args:
        row: the batch row.
        state: of the stream.
        due: what expires up to this time, in seconds since 1970, is left out.
    """
    group: list[Piece] = []
    for piece in _pieces(state):
        source = state.sources[piece.source]
        if _is_due(source, due):
            continue
        alone = piece.short or piece.waits
        if group and (alone or group[-1].source != piece.source or group[-1].short or group[-1].waits):
            yield _unit(row, state, group)
            group = []
        group.append(piece)
    if group:
        yield _unit(row, state, group)


def _unit(row: int, state: StreamState, group: Sequence[Piece]) -> Unit:
    first = group[0]
    ids = [piece.ids for piece in group]
    return Unit(row, state.sources[first.source], ids, short=first.short, waits=first.waits)


def text_units(row: int, state: StreamState, due: float, tokenizer: Tokenizer | None, most: int) -> list[Unit]:
    """Return what a stream holds as texts, in order of writing.

    Where all of a source was written under ids, each of its writes is a text. Else the chunks of a source are, but for
    those that were cut from one text as far as can be told: they follow one another, and are too long together to have
    been one chunk.

    Args:
        row, state, due: as for ``kept_units``.
        tokenizer: of the kept ids.
        most: tokens of a chunk; where chunks end within sentences, they may have been cut shorter than that.

    Raises InputError: there is no tokenizer for ids.
    """
    if "entries" in state.row_lists():
        entries = state.entries()  # type: ignore[attr-defined]
        found = [(entry.source, "\t".join(entry.fields)) for entry in entries]
        sources = {source.name: source for source in state.sources}
        return [Unit(row, sources[name], text=text) for name, text in found if not _is_due(sources[name], due)]
    pieces: dict[int, list[tuple[int, Tensor]]] = defaultdict(list)
    for place, piece in enumerate(_pieces(state)):
        pieces[piece.source].append((place, piece.ids))
    longest = max((len(ids) for own in pieces.values() for _, ids in own), default=0)
    units: list[tuple[int, Unit]] = []
    for number, own in pieces.items():
        source = state.sources[number]
        if _is_due(source, due):
            continue
        ids, starts = torch.cat([part for _, part in own]), [0, *accumulate(len(part) for _, part in own)]
        records = [record for record in state.writes if record.source == number]
        ends = [0, *accumulate(record.tokens for record in records)]
        if ends[-1] != len(ids) or not all(record.is_finished for record in records):
            records, ends = [], _text_ends(own, most, longest, tokenizer)
        for at, (begin, end) in enumerate(pairwise(ends)):
            place = max(place for (place, _), start in zip(own, starts, strict=False) if start <= begin)
            text = _decoded(ids[begin:end], tokenizer)
            units.append((place, Unit(row, source, text=text, record=records[at] if records else None)))
    return [unit for _, unit in sorted(units, key=lambda pair: pair[0]) if unit.text and unit.text.strip()]


def _is_due(source: Source, due: float) -> bool:
    return source.expires is not None and source.expires <= due


def _text_ends(own: Sequence[tuple[int, Tensor]], most: int, longest: int, tokenizer: Tokenizer | None) -> list[int]:
    """Return 0 and the places behind each text in the ids of a source, as far as its chunks tell.

    Args:
        own: places and ids of its chunks.
        most: tokens of a chunk; two that are longer together were cut.
        longest: tokens of the longest chunk of the stream; two that are longer together were cut if the first one ends
            within a sentence, unless all are as short as notes are.
        tokenizer: of the ids.
    """
    ends, at = [0], 0
    for (place, part), (later, following) in pairwise(own):
        at, together = at + len(part), len(part) + len(following)
        cut = together > most or (
            together > longest >= SHORT and SENTENCE_END.search(_decoded(part[-SHORT:], tokenizer)) is None
        )
        if later != place + 1 or not cut:
            ends.append(at)
    return [*ends, at + len(own[-1][1])]


def _decoded(ids: Tensor, tokenizer: Tokenizer | None) -> str:
    if tokenizer is None:
        raise InputError("kept ids are made text by the tokenizer that they are of: pass old_tokenizer=")
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def _pieces(state: StreamState) -> Iterator[Piece]:
    """Yield the ids that a stream keeps, in order of writing, and behind them those that wait."""
    if state.texts is not None:
        for text in state.texts.chunks():
            yield Piece(text.source, text.ids.long(), text.short)
    else:
        for number, _, ids in state.kept_chunks() or ():
            yield Piece(number, ids)
    for part in state.tail:
        yield Piece(part.source, part.ids.long(), waits=True)
