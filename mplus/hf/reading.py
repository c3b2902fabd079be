"""Reading: the view of a memory that one forward or one generation works on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from attrs import define, evolve, field
from torch import Tensor

from mplus.backends.base import Segment
from mplus.errors import InputError, MemoryMismatchError
from mplus.hf.discovery import AttentionSpec
from mplus.hf.passes import Prefix, Project
from mplus.hf.prepared import Prepared
from mplus.hf.weights import Look
from mplus.mechanisms.base import MemoryMechanism, Retrieved
from mplus.memory.memory import Memory
from mplus.memory.stream import StreamView


@define(frozen=True, eq=False)
class Repeated:
    """``segments``: those ``of`` every stream, ``repeats`` times each."""

    of: tuple[Segment, ...]
    repeats: int
    segments: tuple[Segment, ...]


@define(eq=False)
class Reading:
    """A snapshot of a memory, which never changes, with what was retrieved and projected from it so far.

    Attributes:
        mechanism: decides what a layer sees.
        views: one stream per batch row of the memory.
        memory: the memory the views were taken from (None for a test pass), and its ``version`` then.
        prepared: what reads of this state share, where rows are kept projected; else None.
        look: the weights it began with; None for a test pass.
        keep: remember projections for later tokens; off where gradients flow, because they must be recomputed.
        repeats_allowed: a batch may hold several copies of each row in turn (beams, several samples).
        prompt_tokens: retrieve with so many tokens of the first forward only (the rest is guessed); None: with all.
        retrieve_every: retrieve anew after so many further tokens.
        retrieved: what each memory layer retrieved last.
        segments: what each memory layer sees in front of the text.
        repeated: the same for a batch that holds several copies of each row.
        recent: attention inputs of tokens since the last retrieval.
    """

    mechanism: MemoryMechanism
    views: Sequence[StreamView]
    memory: Memory | None = None
    version: int = -1
    prepared: Prepared | None = None
    look: Look | None = None
    keep: bool = True
    repeats_allowed: bool = False
    prompt_tokens: int | None = None
    retrieve_every: int | None = None
    retrieved: dict[int, list[Retrieved | None]] = field(factory=dict)
    segments: dict[int, tuple[Segment, ...]] = field(factory=dict)
    repeated: dict[int, Repeated] = field(factory=dict)
    recent: dict[int, list[Tensor]] = field(factory=dict)

    def is_of(self, memory: Memory) -> bool:
        """Whether ``memory`` is still in the state this reading was taken in."""
        return self.memory is memory and self.version == memory.version

    def __deepcopy__(self, memo: Any) -> Reading:
        """A reading of the same memory: copying a key/value cache must not copy memory and model with it."""
        recent = {layer: list(parts) for layer, parts in self.recent.items()}
        return evolve(self, retrieved=dict(self.retrieved), segments=dict(self.segments), repeated={}, recent=recent)

    def prefix_rows(self) -> list[int]:
        """Rows in front of the text of each stream, in the layer that has most."""
        return [self.mechanism.prefix_rows(view) for view in self.views]

    def source(self, text_mask: Tensor | None) -> ReadSource:
        """The prefix source of one forward over text with this ``[B, T]`` bool mask (None: no padding)."""
        return ReadSource(self, text_mask)

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
    """Gives every layer ``[begin | retrieved | STM]`` (M+ section 3.3)."""

    reading: Reading
    text_mask: Tensor | None
    _query_mask: Tensor | None = field(default=None, init=False)

    def prefix(self, spec: AttentionSpec, hidden: Tensor, project: Project) -> tuple[Segment, ...]:
        reading, layer = self.reading, spec.memory_index
        repeats = reading.repeats(hidden.shape[0])
        known = reading.segments.get(layer)
        if known is not None and not self._due(layer, hidden, repeats):
            return self._repeated(layer, known, repeats)
        if not any(map(reading.mechanism.has_prefix, reading.views)):
            return ()
        if layer not in reading.retrieved:
            with torch.no_grad():
                reading.retrieved[layer] = self._retrieve(layer, hidden[::repeats, : reading.prompt_tokens])
        made = self._made(layer, hidden, project)
        if reading.keep:
            reading.segments[layer] = made
        return self._repeated(layer, made, repeats)

    def _repeated(self, layer: int, segments: tuple[Segment, ...], repeats: int) -> tuple[Segment, ...]:
        """The same tuple for the same segments, so that a cache that keeps them knows them again."""
        if repeats == 1:
            return segments
        kept = self.reading.repeated.get(layer)
        if kept is None or kept.of is not segments or kept.repeats != repeats:
            kept = Repeated(segments, repeats, tuple(_repeat(segment, repeats) for segment in segments))
            if self.reading.keep:
                self.reading.repeated[layer] = kept
        return kept.segments

    def _made(self, layer: int, hidden: Tensor, project: Project) -> tuple[Segment, ...]:
        reading = self.reading
        views, retrieved, prepared = reading.views, reading.retrieved[layer], reading.prepared
        if prepared is None or not self._as_kept(prepared):
            rows = assemble(reading.mechanism, views, layer, retrieved, hidden)
            if reading.look is None or reading.look.names is None:
                return (project(rows),)
            # PEFT's layers count on the rows of the batch: each stream once for each of its copies.
            repeats = len(reading.look.names) // len(views)
            return (_every(project(_repeated_rows(rows, repeats)), repeats),)
        with torch.no_grad():
            prefixed = [reading.mechanism.has_prefix(view) for view in views]
            return prepared.segments(layer, views, retrieved, prefixed, hidden)

    def _as_kept(self, prepared: Prepared) -> bool:
        """Whether rows are read as they were projected, rather than projected anew."""
        if not self.reading.views[0].store.layout.keeps_hidden:
            return True
        # Where gradients flow the reading adapter learns by what it makes of the rows.
        return self.reading.keep and prepared.projection.retrofit.technique == "attention"

    def _retrieve(self, layer: int, hidden: Tensor) -> list[Retrieved | None]:
        mask = self._query_mask
        if mask is None or mask.shape != hidden.shape[:2] or mask.device != hidden.device:
            mask = self._query_mask = self._tokens_asked_with(hidden)
        return self.reading.mechanism.retrieve(layer, hidden, mask, self.reading.views)

    def _tokens_asked_with(self, hidden: Tensor) -> Tensor:
        """``[B, T]`` bool: the tokens that retrieve; the same in all layers."""
        mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        if self.text_mask is not None:
            step = self.text_mask.shape[0] // hidden.shape[0]
            mask = self.text_mask[::step, : hidden.shape[1]].to(hidden.device)
        limit = self.reading.mechanism.config.query_tokens
        if limit is not None:
            mask = mask & (mask.cumsum(1) <= limit)
        if not bool(mask.any(1).all()):
            row = int((~mask.any(1)).nonzero()[0])
            raise InputError(f"attention_mask must leave at least one token in every batch row, row {row} has none")
        return mask

    def _due(self, layer: int, hidden: Tensor, repeats: int) -> bool:
        """Collect a further token; when enough have come, forget what was retrieved so that it is done anew."""
        reading = self.reading
        if reading.retrieve_every is None:
            return False
        seen = reading.recent.setdefault(layer, [])
        seen.append(hidden.detach())
        if sum(part.shape[1] for part in seen) < reading.retrieve_every:
            return False
        recent = torch.cat(seen, 1)[::repeats]
        reading.recent[layer] = []
        everything = ReadSource(reading, None)
        with torch.no_grad():
            reading.retrieved[layer] = everything._retrieve(layer, recent)
        return True


def assemble(
    mechanism: MemoryMechanism,
    views: Sequence[StreamView],
    layer: int,
    retrieved: Sequence[Retrieved | None],
    like: Tensor,
) -> Prefix:
    """``[begin | retrieved | STM]`` of every stream; device and dtype of ``like``."""
    begin = mechanism.additions.begin[layer]
    streams = []
    for view, found in zip(views, retrieved, strict=True):
        parts = [begin] if mechanism.has_prefix(view) else []
        if found is not None:
            parts.append(found.rows.need_hidden())
        parts.append(view.state.stm[layer].need_hidden())
        streams.append(torch.cat([part.to(like) for part in parts]))
    return side_by_side(streams)


def side_by_side(streams: Sequence[Tensor]) -> Prefix:
    """Rows ``[P_b, d]`` of every stream as one prefix; shorter ones get filler behind."""
    rows = max(part.shape[0] for part in streams)
    if all(part.shape[0] == rows for part in streams):
        return Prefix(torch.stack(list(streams)))
    hidden = torch.stack([torch.nn.functional.pad(part, (0, 0, 0, rows - part.shape[0])) for part in streams])
    return Prefix(hidden, torch.tensor([part.shape[0] for part in streams], device=hidden.device))


def _repeated_rows(prefix: Prefix, repeats: int) -> Prefix:
    lengths = None if prefix.lengths is None else prefix.lengths.repeat_interleave(repeats, 0)
    return evolve(prefix, hidden=prefix.hidden.repeat_interleave(repeats, 0), lengths=lengths)


def _every(segment: Segment, repeats: int) -> Segment:
    lengths = None if segment.lengths is None else segment.lengths[::repeats]
    return Segment(segment.keys[::repeats], segment.values[::repeats], lengths)


def _repeat(segment: Segment, repeats: int) -> Segment:
    if segment.keys.shape[0] == 1 and segment.lengths is None:
        return segment  # batch 1 is shared by all rows
    lengths = None if segment.lengths is None else segment.lengths.repeat_interleave(repeats, 0)
    return Segment(segment.keys.repeat_interleave(repeats, 0), segment.values.repeat_interleave(repeats, 0), lengths)
