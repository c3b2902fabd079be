"""Reading: the view of a memory that one forward or one generation works on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from attrs import define, evolve, field
from torch import Tensor

from mplus.backends.base import Segment
from mplus.errors import InputError, MemoryMismatchError, NotSupported
from mplus.hf.adapters.weights import Look
from mplus.hf.reading.query_tokens import Recent, Window, first_tokens
from mplus.hf.retrofit.discovery import AttentionSpec
from mplus.mechanisms.base import MemoryMechanism, Opened, Retrieved
from mplus.mechanisms.decoder import Attended, Decoder, Project, Rows, Text
from mplus.memory.memory import Memory
from mplus.memory.state import StreamView

Front = tuple[Segment, ...] | Attended
"""What a layer sees in front of the text."""


@define(frozen=True, eq=False)
class Repeated:
    """``segments``: those ``of`` every stream, ``repeats`` times each."""

    of: Front
    repeats: int
    segments: Front


@define(eq=False)
class Reading:
    """A snapshot of a memory, which never changes, with what was retrieved and projected from it so far.

    Attributes:
        mechanism: decides what a layer sees.
        views: one stream per batch row of the memory.
        memory: the memory the views were taken from (None for a test pass), and its ``version`` then.
        prepared: what reads of this state share, where rows are read as they are kept; else None.
        opened: what the mechanism made ready for the first forward.
        look: the weights it began with; None for a test pass.
        keep: remember projections for later tokens; off where gradients flow, because they must be recomputed.
        repeats_allowed: a batch may hold several copies of each row in turn (beams, several samples).
        prompt_tokens: retrieve with so many columns of the first forward only (the rest is guessed); None: with all.
        query_tokens: of these, retrieve with the first so many tokens; one number, or one per stream. None: as
            configured.
        query_mask: ``[B, T]`` bool, False at what looks like padding in a text that came without a mask.
        retrieve_every: retrieve anew after so many further tokens.
        context_tokens: tokens of the first forward that do not count as further ones; as ``query_tokens``. None: all.
        retrieved: what each memory layer retrieved last.
        segments: what each memory layer sees in front of the text.
        repeated: the same for a batch that holds several copies of each row.
        recent: of each memory layer, the text since the last retrieval, where there is ``retrieve_every``.
    """

    mechanism: MemoryMechanism
    views: Sequence[StreamView]
    memory: Memory | None = None
    version: int = -1
    prepared: Any = None
    look: Look | None = None
    keep: bool = True
    repeats_allowed: bool = False
    prompt_tokens: int | None = None
    query_tokens: int | tuple[int, ...] | None = None
    query_mask: Tensor | None = None
    retrieve_every: int | None = None
    context_tokens: int | tuple[int, ...] | None = None
    retrieved: dict[int, list[Retrieved | None]] = field(factory=dict)
    segments: dict[int, Front] = field(factory=dict)
    repeated: dict[int, Repeated] = field(factory=dict)
    recent: dict[int, Recent] = field(factory=dict)
    opened: Opened | None = None

    def open(self, decoder: Decoder, text: Text) -> Opened:
        """Let the mechanism get ready, at the first forward; return what it made."""
        if self.opened is None:
            self.opened = evolve(self.mechanism.open(decoder, self.views, text), prepared=self._as_kept())
        return self.opened

    def need_opened(self) -> Opened:
        """Return what ``open`` made; of a reading that was made by hand, one that nothing was prepared for."""
        if self.opened is None:
            self.opened = Opened(self.views, prepared=self._as_kept())
        return self.opened

    def _as_kept(self) -> Any:
        """Return ``prepared``, unless rows with hidden states are to be projected anew."""
        # Where gradients flow the reading adapter learns by what it makes of the rows.
        return self.prepared if self.keep or not self.views[0].store.layout.keeps_hidden else None

    def is_of(self, memory: Memory) -> bool:
        """Whether ``memory`` is still in the state this reading was taken in."""
        return self.memory is memory and self.version == memory.version

    def __deepcopy__(self, memo: Any) -> Reading:
        """A reading of the same memory: copying a key/value cache must not copy memory and model with it."""
        recent = dict(self.recent)
        return evolve(self, retrieved=dict(self.retrieved), segments=dict(self.segments), repeated={}, recent=recent)

    def prefix_rows(self) -> list[int]:
        """Rows in front of the text of each stream, in the layer that has most."""
        return [self.mechanism.prefix_rows(view) for view in self.views]

    def source(self, text_mask: Tensor | None, piece: bool = False) -> ReadSource:
        """The prefix source of one forward.

        Args:
            text_mask: ``[B, T]`` bool of its text; None: no padding.
            piece: it is a piece of a text that is read in pieces: only its first column may retrieve anew.
        """
        return ReadSource(self, text_mask, piece)

    def repeats(self, rows: int) -> int:
        """Copies of each stream in a batch of ``rows``. Raises MemoryMismatchError when they do not fit."""
        streams = len(self.views)
        # What one row read fits every copy of it: the cache of a prompt, repeated for several questions to it.
        if rows == streams or (rows and rows % streams == 0 and (self.repeats_allowed or streams == 1)):
            return rows // streams
        raise _other_batch(rows, streams)


def one_per_row(views: Sequence[StreamView], rows: int) -> Sequence[StreamView]:
    """A view for every row of a batch; a memory of one stream is read by all of them, and nothing is copied.

    Args:
        views: of a memory, one per stream.
        rows: texts in the batch, without beams and further samples of a prompt.

    Raises:
        MemoryMismatchError: the memory has several streams, and the batch has another number of rows.
    """
    if rows and len(views) == 1:
        return [views[0]] * rows
    if len(views) != rows:
        raise _other_batch(rows, len(views))
    return views


def _other_batch(rows: int, streams: int) -> MemoryMismatchError:
    return MemoryMismatchError(
        f"the batch has {rows} rows and the memory {streams}: pass one row per stream, or choose streams for the rows "
        "with memory.select (a memory of one stream is read by every row)"
    )


@define(eq=False)
class ReadSource:
    """Gives every layer what the mechanism puts in front of the text, and lets it retrieve where that is due."""

    reading: Reading
    text_mask: Tensor | None
    piece: bool = False
    _first: bool = field(init=False)
    _query_mask: Tensor | None = field(default=None, init=False)
    _window: Window | None = field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        self._first = not self.reading.retrieved

    def prefix(self, spec: AttentionSpec, hidden: Tensor, project: Project) -> tuple[Segment, ...] | Attended:
        reading, layer = self.reading, spec.memory_index
        repeats = reading.repeats(hidden.shape[0])
        if not any(map(reading.mechanism.has_prefix, reading.views)):
            return ()
        with torch.no_grad():
            anew = self._retrieve_where_due(layer, hidden, repeats)
        known = None if anew else reading.segments.get(layer)
        if known is None:
            known = self._made(layer, hidden, project)
            if reading.keep:
                reading.segments[layer] = known
        return self._repeated(layer, known, repeats)

    def _repeated(self, layer: int, found: Front, repeats: int) -> Front:
        """The same tuple for the same segments, so that a cache that keeps them knows them again."""
        if repeats == 1:
            return found
        kept = self.reading.repeated.get(layer)
        if kept is None or kept.of is not found or kept.repeats != repeats:
            segments = found.segments if isinstance(found, Attended) else found
            copies = tuple(_repeat(segment, repeats) for segment in segments)
            again = evolve(found, segments=copies) if isinstance(found, Attended) else copies
            kept = Repeated(found, repeats, again)
            if self.reading.keep:
                self.reading.repeated[layer] = kept
        return kept.segments

    def _made(self, layer: int, hidden: Tensor, project: Project) -> Front:
        reading = self.reading
        if reading.look is not None and reading.look.names is not None:
            # PEFT's layers count on the rows of the batch: each stream once for each of its copies.
            repeats = len(reading.look.names) // len(reading.views)
            project = partial(_projected_for_each, project, repeats)
        opened = reading.need_opened()
        found = reading.mechanism.prefix(opened, layer, reading.retrieved[layer], hidden, project)
        return () if found is None else found

    def _retrieve_where_due(self, layer: int, hidden: Tensor, repeats: int) -> bool:
        """Retrieve for a new text, and anew where enough tokens have come. Returns whether anything was retrieved."""
        reading = self.reading
        anew = layer not in reading.retrieved
        if anew:
            reading.retrieved[layer] = self._retrieve(layer, hidden[::repeats, : reading.prompt_tokens])
        if reading.retrieve_every is None:
            return anew
        if repeats > 1:
            raise NotSupported("retrieve_every needs a stream per row: what is retrieved is for one continuation")
        window, before = self._due(hidden), reading.recent.get(layer)
        text = hidden.detach() if before is None else torch.cat([before.hidden, hidden.detach()], 1)
        if window.rows:
            self._retrieve_anew(layer, text[window.rows, : window.queries.shape[1]], window)
        rest = text[:, window.begin :].clone() if window.begin else text
        reading.recent[layer] = Recent(rest, window.waiting)
        return anew or bool(window.rows)

    def _retrieve(self, layer: int, hidden: Tensor) -> list[Retrieved | None]:
        mask = self._query_mask
        if mask is None or mask.device != hidden.device:
            mask = self._query_mask = self._tokens_asked_with(hidden)
        return self.reading.mechanism.retrieve(layer, hidden, mask, self.reading.views)

    def asked(self, text: Tensor) -> Tensor:
        """Return ``[B, T]`` bool: the tokens of ``text`` ``[B, T, ...]``, a row per stream, that retrieve."""
        guessed = text.shape[1] if self.reading.prompt_tokens is None else self.reading.prompt_tokens
        mask = self._query_mask = self._tokens_asked_with(text[:, :guessed])
        return torch.nn.functional.pad(mask, (0, text.shape[1] - mask.shape[1]), value=False)

    def _tokens_asked_with(self, hidden: Tensor) -> Tensor:
        """``[B, T]`` bool: the tokens that retrieve; the same in all layers."""
        reading = self.reading
        mask = self._text(hidden).to(hidden.device)
        if not bool(mask.any(1).all()):
            row = int((~mask.any(1)).nonzero()[0])
            raise InputError(f"attention_mask must leave at least one token in every batch row, row {row} has none")
        if reading.query_mask is not None:
            mask = mask & reading.query_mask[:, : hidden.shape[1]].to(hidden.device)
        limit = reading.query_tokens
        return first_tokens(mask, reading.mechanism.config.query_tokens if limit is None else limit)

    def _text(self, hidden: Tensor) -> Tensor:
        """``[B, T]`` bool: which places of ``hidden`` ``[B, T, d]``, one row per stream, are text."""
        if self.text_mask is None:
            return torch.ones(hidden.shape[:2], dtype=torch.bool)
        step = self.text_mask.shape[0] // hidden.shape[0]
        return self.text_mask[::step, : hidden.shape[1]]

    def _due(self, hidden: Tensor) -> Window:
        """Which rows retrieve anew in this forward; the same in all layers."""
        if self._window is None:
            reading, text = self.reading, self._text(hidden).cpu()
            first = 1 if self.piece else hidden.shape[1]
            if self._first:
                context = text if reading.context_tokens is None else first_tokens(text, reading.context_tokens)
                text, first = text & ~context, 0
            before = next(iter(reading.recent.values()), None)
            every: Any = reading.retrieve_every
            self._window = Window.of(None if before is None else before.waiting, text, first, every)
        return self._window

    def _retrieve_anew(self, layer: int, hidden: Tensor, window: Window) -> None:
        """Exchange what the rows of ``window`` retrieved, with ``hidden`` ``[rows, T, d]`` as queries."""
        reading = self.reading
        queries = first_tokens(window.queries.to(hidden.device), reading.mechanism.config.query_tokens)
        views = [reading.views[row] for row in window.rows]
        now = list(reading.retrieved[layer])
        for row, found in zip(window.rows, reading.mechanism.retrieve(layer, hidden, queries, views), strict=True):
            now[row] = found
        reading.retrieved[layer] = now


def _projected_for_each(project: Project, repeats: int, rows: Rows) -> Segment:
    """Project rows of which each stream stands in the batch ``repeats`` times, and return those of each stream."""
    lengths = None if rows.lengths is None else rows.lengths.repeat_interleave(repeats, 0)
    positions = rows.positions
    if positions is not None and positions.shape[0] > 1:
        positions = positions.repeat_interleave(repeats, 0)
    hidden = rows.hidden.repeat_interleave(repeats, 0)
    found = project(evolve(rows, hidden=hidden, lengths=lengths, positions=positions))
    lengths = None if found.lengths is None else found.lengths[::repeats]
    return Segment(found.keys[::repeats], found.values[::repeats], lengths)


def _repeat(segment: Segment, repeats: int) -> Segment:
    lengths, bias = segment.lengths, segment.bias
    if bias is not None and bias.shape[0] > 1:
        bias = bias.repeat_interleave(repeats, 0)
    if segment.keys.shape[0] == 1 and lengths is None:  # batch 1 is shared by all rows
        return segment if bias is segment.bias else evolve(segment, bias=bias)
    lengths = None if lengths is None else lengths.repeat_interleave(repeats, 0)
    keys, values = (part.repeat_interleave(repeats, 0) for part in (segment.keys, segment.values))
    return Segment(keys, values, lengths, bias)
