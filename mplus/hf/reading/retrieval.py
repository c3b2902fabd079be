"""When the layers of a read retrieve, and with which tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from attrs import define, evolve, field
from torch import Tensor
from transformers import Cache

from mplus.backends.base import Segment
from mplus.errors import InputError, MechanismError, NotSupported
from mplus.hf.reading.caches import TextSoFar, first_tokens
from mplus.hf.reading.reading import Front, Reading, Repeated
from mplus.hf.retrofit.discovery import AttentionSpec
from mplus.hf.retrofit.placement import Placement
from mplus.mechanisms.decoder import Attended, Decoder, Project, Rows, Text
from mplus.mechanisms.opened import Retrieved


@define(eq=False)
class ReadSource:
    """Gives every layer what the mechanism puts in front of the text, and lets it retrieve where that is due.

    Attributes:
        reading: what is read.
        text_mask: ``[B, T]`` bool of the text of this forward; None: no padding.
        piece: it is a piece of a text that is read in pieces: only its first column may retrieve anew.
    """

    reading: Reading
    text_mask: Tensor | None
    piece: bool = False
    _first: bool = field(init=False)
    _query_mask: Tensor | None = field(default=None, init=False)
    _window: Window | None = field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        self._first = self.reading.opened is None

    def prefix(self, spec: AttentionSpec, hidden: Tensor, project: Project) -> tuple[Segment, ...] | Attended:
        reading, layer = self.reading, spec.memory_index
        repeats = reading.repeats(hidden.shape[0])
        if not any(map(reading.mechanism.has_prefix, reading.views)):
            return ()
        with torch.no_grad():
            anew = self._retrieve_where_due(layer, hidden, repeats)
        front = None if anew else reading.segments.get(layer)
        if front is None:
            front = self._front(layer, hidden, project)
            if reading.keep:
                reading.segments[layer] = front
        return self._repeated(layer, front, hidden.shape[0] // len(reading.need_opened().views))

    def _repeated(self, layer: int, front: Front, repeats: int) -> Front:
        """Return the same tuple for the same segments, so that a cache that keeps them knows them again."""
        if repeats == 1:
            return front
        copied = self.reading.repeated.get(layer)
        if copied is None or copied.of is not front or copied.repeats != repeats:
            segments = front.segments if isinstance(front, Attended) else front
            copies = tuple(_repeat(segment, repeats) for segment in segments)
            again = evolve(front, segments=copies) if isinstance(front, Attended) else copies
            copied = Repeated(front, repeats, again)
            if self.reading.keep:
                self.reading.repeated[layer] = copied
        return copied.segments

    def _front(self, layer: int, hidden: Tensor, project: Project) -> Front:
        reading, opened = self.reading, self.reading.need_opened()
        if reading.look is not None and reading.look.names is not None:
            # PEFT's layers count on the rows of the batch: each stream once for each of its copies.
            repeats = len(reading.look.names) // len(opened.views)
            project = partial(_projected_for_each, project, repeats)
        copies, retrieved = len(opened.views) // len(reading.views), reading.retrieved[layer]
        of_rows = retrieved if copies == 1 else [one for one in retrieved for _ in range(copies)]
        said = f"the mechanism {reading.mechanism.name!r}: prefix"
        try:
            front = reading.mechanism.prefix(opened, layer, of_rows, hidden, partial(_projected, project, said, layer))
        except IndexError as error:  # of a list that the layout has not, say
            raise MechanismError(f"{said} failed for layer {layer}: {error}") from error
        segments = front.segments if isinstance(front, Attended) else () if front is None else front
        if not isinstance(segments, tuple | list) or not all(isinstance(one, Segment) for one in segments):
            foreign = segments if isinstance(segments, tuple | list) else ()
            of = next((f" with a {type(one).__name__}" for one in foreign if not isinstance(one, Segment)), "")
            raise MechanismError(
                f"{said} must return a tuple of Segments, Attended or None for layer {layer}, got "
                f"{type(front).__name__}{of}"
            )
        batches = {one.keys.shape[0] for one in segments} - {1, len(opened.views)}
        if batches:
            raise MechanismError(
                f"{said} must return rows of 1 or {len(opened.views)} streams for layer {layer}, got those of "
                f"{batches.pop()}"
            )
        most = [reading.mechanism.prefix_rows(view) for view in opened.views]
        # Segments of several streams are as long as the longest of each, so what is shorter is counted by itself.
        if sum(one.keys.shape[2] for one in segments) > min(most):
            for given, says in zip(_rows_of_each(segments, len(most)), most, strict=True):
                if given > says:  # positions are those of so many
                    raise MechanismError(
                        f"{said} must return at most as many rows as prefix_rows says, {says}, for layer {layer}, got "
                        f"{given}"
                    )
        return () if front is None else front

    def _retrieve_where_due(self, layer: int, hidden: Tensor, repeats: int) -> bool:
        """Retrieve for a new text ``[B, T, d]``, and anew where enough tokens have come; return whether it did."""
        reading = self.reading
        anew = layer not in reading.retrieved
        if anew:
            reading.retrieved[layer] = self._retrieve(layer, hidden[::repeats, : reading.prompt_tokens])
        if reading.retrieve_every is None or not reading.mechanism.retrieves:
            return anew
        if repeats > 1:
            raise NotSupported("retrieve_every needs a stream per row: what is retrieved is for one continuation")
        window, before = self._due(hidden), reading.recent.get(layer)
        text = hidden.detach() if before is None else torch.cat([before, hidden.detach()], 1)
        if window.rows:
            self._retrieve_anew(layer, text[window.rows, : window.queries.shape[1]], window)
        reading.recent[layer] = text[:, window.begin :].clone() if window.begin else text
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
        """Return ``[B, T]`` bool, the tokens that retrieve; the same in all layers."""
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
        """Return ``[B, T]`` bool, which places of ``hidden`` ``[B, T, d]``, one row per stream, are text."""
        if self.text_mask is None:
            return torch.ones(hidden.shape[:2], dtype=torch.bool)
        step = self.text_mask.shape[0] // hidden.shape[0]
        return self.text_mask[::step, : hidden.shape[1]]

    def _due(self, hidden: Tensor) -> Window:
        """Return the rows that retrieve anew in this forward, with their tokens; the same in all layers."""
        if self._window is None:
            reading, text = self.reading, self._text(hidden).cpu()
            first = 1 if self.piece else hidden.shape[1]
            if self._first:
                context = text if reading.context_tokens is None else first_tokens(text, reading.context_tokens)
                text, first = text & ~context, 0
            self._window = Window.of(reading.waiting, text, first, reading.retrieve_every or 1)
            reading.waiting = self._window.waiting
        return self._window

    def _retrieve_anew(self, layer: int, hidden: Tensor, window: Window) -> None:
        """Exchange what the rows of ``window`` retrieved, with ``hidden`` ``[rows, T, d]`` as queries."""
        reading = self.reading
        queries = first_tokens(window.queries.to(hidden.device), reading.mechanism.config.query_tokens)
        views = [reading.views[row] for row in window.rows]
        all_rows = list(reading.retrieved[layer])
        for row, retrieved in zip(window.rows, reading.mechanism.retrieve(layer, hidden, queries, views), strict=True):
            all_rows[row] = retrieved
        reading.retrieved[layer] = all_rows


def reopen_where_due(reading: Reading, decoder: Decoder, text: TextSoFar, new: int, piece: bool) -> None:
    """Let the mechanism choose anew for the rows of which enough tokens have come.

    Args:
        reading: with ``retrieve_every``, of a mechanism that ``reopens``.
        decoder: what the mechanism may run passes with.
        text: all of the text, that of this forward included.
        new: tokens of this forward.
        piece: only the first of these is looked at.
    """
    mechanism, rows = reading.mechanism, text.mask.shape[0]
    tokenizer = reading.tokenizer
    end = text.tokens - new + (1 if piece else new)
    due = text.waiting(end) >= (reading.retrieve_every or 1)
    opened, all_rows = reading.need_opened(), text.rearranged
    if len(opened.views) != rows:  # beams or samples, each of which may read something else from here on
        copies = reading.repeats(rows)
        views = [view for view in reading.views for _ in range(copies)]
        opened, all_rows = mechanism.open(decoder, views, reading.asking(text.opened(tokenizer), copies)), True
    text.rearranged = False
    anew = due.nonzero().squeeze(1).tolist()
    if all_rows and (anew or text.reopened):
        anew = list(range(rows))
    if anew:
        text.chosen, text.reopened = torch.where(due, end, text.chosen), True
        limit = mechanism.config.query_tokens
        so_far = evolve(text.until_chosen(tokenizer, limit), min_score=reading.min_score)
        opened = mechanism.reopen(decoder, opened, so_far, anew)
    if opened is not reading.opened:
        reading.exchange(opened)


def resume(reading: Reading, decoder: Decoder, text: TextSoFar, new: int, cache: Cache) -> None:
    """Let the mechanism choose what the new tokens of a text read besides, in the first forward of a call.

    Args:
        reading: of a mechanism that ``reopens``.
        decoder: what the mechanism may run passes with.
        text: all of the text, the ``new`` tokens of this forward included.
        new: tokens of this forward.
        cache: of the tokens in front of these.

    Raises:
        MechanismError: the mechanism would move text that was read.
        NotSupported: the cache holds different continuations of one prompt.
    """
    if text.ids is None:
        return
    opened = reading.need_opened()
    copies, end = len(text.mask) // len(opened.views), text.tokens
    if reading.prompt_tokens is not None:  # what is guessed behind it asks for nothing
        end = min(end, max(reading.prompt_tokens, text.tokens - new + 1))
    ids, mask = text.ids[::copies], text.mask[::copies]
    if copies > 1 and not torch.equal(ids.repeat_interleave(copies, 0), text.ids):
        raise NotSupported(
            f"a cache of {len(text.mask)} different continuations of {len(opened.views)} prompts cannot be gone on "
            "with: select one of each with past_key_values.batch_select_indices"
        )
    tokenizer = reading.tokenizer
    told = evolve(reading.asking(Text(ids[:, :end], mask[:, :end], tokenizer)), limited=False)
    read = mask[:, : text.tokens - new].sum(1).cpu()
    now = reading.mechanism.resume(decoder, opened, told, read)
    if now is not opened and now.insertion is not None:
        reading.extend(now, read)
        before = int(cache.get_seq_length()) - (text.tokens - new)  # learned virtual tokens
        reading.starts = Placement.starts_of(now.insertion, mask, before)


def _rows_of_each(segments: Sequence[Segment], streams: int) -> list[int]:
    rows = torch.zeros(streams, dtype=torch.long)
    for segment in segments:
        rows += segment.keys.shape[2] if segment.lengths is None else segment.lengths.cpu()
    return rows.tolist()


def _projected(project: Project, said: str, layer: int, rows: Rows) -> Segment:
    """Project rows; what is wrong with their form is the mechanism's fault, who made them."""
    try:
        return project(rows)
    except InputError as error:
        raise MechanismError(f"{said} failed for layer {layer}: {error}") from error


def _projected_for_each(project: Project, repeats: int, rows: Rows) -> Segment:
    """Project rows of which each stream stands in the batch ``repeats`` times, and return those of each stream."""
    lengths = None if rows.lengths is None else rows.lengths.repeat_interleave(repeats, 0)
    positions = rows.positions
    if positions is not None and positions.shape[0] > 1:
        positions = positions.repeat_interleave(repeats, 0)
    hidden = rows.hidden.repeat_interleave(repeats, 0)
    segment = project(evolve(rows, hidden=hidden, lengths=lengths, positions=positions))
    lengths = None if segment.lengths is None else segment.lengths[::repeats]
    return Segment(segment.keys[::repeats], segment.values[::repeats], lengths)


def _repeat(segment: Segment, repeats: int) -> Segment:
    lengths, bias = segment.lengths, segment.bias
    if bias is not None and bias.shape[0] > 1:
        bias = bias.repeat_interleave(repeats, 0)
    if segment.keys.shape[0] == 1 and lengths is None:  # batch 1 is shared by all rows
        return segment if bias is segment.bias else evolve(segment, bias=bias)
    lengths = None if lengths is None else lengths.repeat_interleave(repeats, 0)
    keys, values = (part.repeat_interleave(repeats, 0) for part in (segment.keys, segment.values))
    return Segment(keys, values, lengths, bias)


def without_padding(ids: Tensor, padding_id: int | None = None) -> Tensor:
    """Return ``[B, T]`` bool, False at what looks like right padding in ``ids`` ``[B, T]`` that came without a mask.

    That is a run of one id at the end of a row, of two tokens or more, or of one that is ``padding_id``. A row that is
    one run altogether keeps all of its tokens.
    """
    tokens = ids.shape[1]
    last = ids[:, -1:]
    run = (ids == last).flip(1).cumprod(1).flip(1).bool()
    length = run.sum(1, keepdim=True)
    padding = length >= 2
    if padding_id is not None:
        padding = padding | (last == padding_id)
    return ~(run & padding & (length < tokens))


@define(frozen=True, eq=False)
class Window:
    """The rows of a batch that retrieve anew in one forward, and their tokens: the same in all layers.

    Attributes:
        rows: those that retrieve.
        queries: ``[len(rows), W + n]`` bool, their tokens among the W recent ones and the first n of the forward.
        begin: how many of the recent and new tokens no row waits with any more.
        waiting: ``[B, W']`` bool, ``Reading.waiting`` of the rest.
    """

    rows: list[int]
    queries: Tensor
    begin: int
    waiting: Tensor

    @staticmethod
    def of(waiting: Tensor | None, text: Tensor, first: int, every: int) -> Window:
        """Find the window of a forward.

        Args:
            waiting: ``Reading.waiting`` so far; None: nothing.
            text: ``[B, T]`` bool on the CPU, the new tokens that count.
            first: so many of the new columns take part in the retrieval.
            every: tokens after which a row retrieves.
        """
        before = text[:, :0] if waiting is None else waiting
        seen = torch.cat([before, text[:, :first]], 1)
        due = seen.sum(1) >= every
        left = torch.cat([seen & ~due[:, None], text[:, first:]], 1)
        begin = int((left.any(0).cumsum(0) == 0).sum())
        return Window(due.nonzero().squeeze(1).tolist(), seen[due], begin, left[:, begin:])
