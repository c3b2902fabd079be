"""What all reads of one state of a memory share: its short-term rows, rotated, and the tables that rotate others."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeAlias, cast

import torch
from attrs import define, evolve, field
from torch import Tensor

from mplus.backends.base import Segment
from mplus.backends.checks import check_finite
from mplus.mechanisms.decoder import KeptProjection, Tables
from mplus.mechanisms.opened import Retrieved
from mplus.mechanisms.short_term.state import state_of
from mplus.memory.state import StreamView
from mplus.rows import MemoryRows

Sizes: TypeAlias = tuple[Sequence[int], Sequence[int], Sequence[int]]
"""Of each stream: rows in front of the short-term ones, these, and rows between them and the text."""


@define(eq=False)
class Prepared:
    """Filled by the first read of a memory's state; the next ones only bring in what they retrieve.

    Attributes:
        projection: of the decoder.
        begin: begin rows ``[L, 1, d]``.
        batch: rows of the batch it is for, where each has an adapter of its own; else None.
        short_term, begins, tables: what was made so far.
    """

    projection: KeptProjection
    begin: Tensor
    batch: int | None = None
    short_term: dict[Hashable, Segment] = field(factory=dict)
    begins: dict[int, Tensor] = field(factory=dict)
    tables: dict[Hashable, Tables | None] = field(factory=dict)

    def segments(
        self,
        layer: int,
        views: Sequence[StreamView],
        retrieved: Sequence[Retrieved | None],
        begins: Sequence[bool],
        like: Tensor,
        tails: Sequence[int] = (),
    ) -> tuple[Segment, ...]:
        """Return ``[begin | retrieved]`` and ``[STM]`` of every stream, ready to be attended to.

        Args:
            layer: index among the layers that carry memory.
            views: one per stream.
            retrieved: per stream, long-term rows.
            begins: per stream, whether the begin row is in front of the text.
            like: gives dtype and device.
            tails: per stream, rows between these and the text; (): none.
        """
        # Made once and kept, though reads may come in another dtype (autocast) or on another device.
        first = [begin.to(like) for begin in self._begins(layer, len(views))]
        own = in_front(retrieved, begins)
        counts = [len(state_of(view).stm[layer]) for view in views]
        sizes = (own, counts, tails or [0] * len(views))
        only = retrieved[0] if len(views) == 1 else None
        # One stream, whose rows lie where they are kept: picked and rotated in one go, with no copy between.
        if only is not None and only.source is not None and _alike(only.source.parts[0][0], like):
            tables = self._tables(layer, own[0], sizes, like)
            front = self.projection.picked(layer, first[0], only.source, tables)
        else:
            parts = [
                [begin, *_projected(found, like)] if there else []
                for begin, found, there in zip(first, retrieved, begins, strict=True)
            ]
            front = self._front(layer, parts, sizes, like)
        segments = (front, self.short_term_segment(layer, views, sizes, like))
        return tuple(segment for segment in segments if segment.keys.shape[2])

    def _kept(self, layer: int, rows: MemoryRows, like: Tensor) -> Tensor:
        """Return keys and values ``[n, w]`` of rows, where only their hidden states are kept projected now."""
        if rows.projected is not None:
            return rows.projected.to(like)
        return self.projection.rows(layer, rows.need_hidden()[None].to(like))[0]

    def begin_row(self, layer: int) -> Tensor:
        """Return the begin row ``[1, w]``, where it is the same for all streams."""
        return self._begins(layer, 1)[0]

    def _begins(self, layer: int, streams: int) -> list[Tensor]:
        """Return the begin row ``[1, w]`` of every stream; not the same where each has an adapter of its own."""
        if layer not in self.begins:
            alike = 1 if self.batch is None else self.batch
            self.begins[layer] = self.projection.rows(layer, self.begin[layer].expand(alike, -1, -1))
        made = self.begins[layer]
        return [made[0]] * streams if self.batch is None else list(made[:: self.batch // streams])

    def _front(self, layer: int, parts: Sequence[Sequence[Tensor]], sizes: Sizes, like: Tensor) -> Segment:
        own = sizes[0]
        rows = max(own)
        tables = self._tables(layer, rows, sizes, like)
        if len(parts) == 1:
            pieces = [part[None] for part in parts[0]]
        else:
            pieces = [torch.stack([_padded(stream, rows, like, self.projection.size) for stream in parts])]
        if not pieces:
            return self._nothing(like)
        segment = self.projection.turned(layer, pieces, tables)
        check_finite("long-term memory", segment.keys, segment.values)
        return with_lengths(segment, own)

    def short_term_segment(self, layer: int, views: Sequence[StreamView], sizes: Sizes, like: Tensor) -> Segment:
        """Return the short-term rows of every stream, rotated; made once and kept."""
        front, counts, tails = sizes
        states = [state_of(view).stm[layer] for view in views]
        # Sequential positions count from the text backwards: what is in front of these rows does not move them.
        compressed = self.projection.positions.layout == "compressed"
        key = (layer, tuple(front) if compressed else None, like.dtype, like.device)
        if key not in self.short_term:
            rows = max(counts)
            if not rows:
                return self._nothing(like)
            # One stream that all prompts of a batch read: its rows are rotated once, and shown to each.
            shared = all(state is states[0] for state in states) and len(set(tails)) == 1
            shared = shared and (not compressed or len(set(front)) == 1)
            states = states[:1] if shared else states
            projected = [self._kept(layer, state, like) for state in states]
            pieces = torch.stack([_padded([part], rows, like, self.projection.size) for part in projected])
            where = _positions(self.projection, torch.arange(rows, device=like.device), sizes, behind=front)
            segment = self.projection.turned(layer, [pieces], self.projection.tables(layer, like, where))
            real = [counts[0]] if shared else counts
            for row, count in enumerate(real):
                check_finite("short-term memory", segment.keys[row, :, :count], segment.values[row, :, :count])
            self.short_term[key] = with_lengths(segment, counts)
        return self.short_term[key]

    def _tables(self, layer: int, rows: int, sizes: Sizes, like: Tensor) -> Tables | None:
        """Return the tables for the rows in front; the same in layers that rotate alike, and in later reads."""
        # Streams alike in size share a row of tables, and with it the tables of any other read of that size.
        numbers = tuple(tuple(dict.fromkeys(each)) if len(set(each)) == 1 else tuple(each) for each in sizes)
        key = (self.projection.table_key(layer), rows, numbers, like.dtype, like.device)
        if key not in self.tables:
            where = _positions(self.projection, torch.arange(rows, device=like.device), sizes)
            self.tables[key] = self.projection.tables(layer, like, where)
        return self.tables[key]

    def _nothing(self, like: Tensor) -> Segment:
        projection = self.projection
        return Segment(
            like.new_empty(1, projection.heads, 0, projection.width),
            like.new_empty(1, projection.heads, 0, projection.value_width),
        )


def _positions(projection: KeptProjection, place: Tensor, sizes: Sizes, behind: Sequence[int] | None = None) -> Tensor:
    """Return ``[B or 1, P]``, where the rows at ``place`` ``[P]`` of their list sit; ``behind`` so many others."""
    behind = [0] * len(sizes[0]) if behind is None else behind
    if all(len(set(each)) == 1 for each in (*sizes, behind)):
        own, counts, tails = sizes
        return projection.positions.of_rows(place + behind[0], own[0] + counts[0], -tails[0])
    front, short, waiting, before = (torch.tensor(each, device=place.device)[:, None] for each in (*sizes, behind))
    return projection.positions.of_rows(place + before, front + short, -waiting)


def in_front(retrieved: Sequence[Retrieved | None], begins: Sequence[bool]) -> list[int]:
    """Return how many rows stand in front of the short-term ones of each stream."""
    pairs = zip(retrieved, begins, strict=True)
    return [1 + (0 if found is None else len(found.rows)) if there else 0 for found, there in pairs]


def _projected(retrieved: Retrieved | None, like: Tensor) -> list[Tensor]:
    """Return the retrieved rows ``[n, w]`` as a list of one tensor; an empty one where there are none."""
    if retrieved is None:
        return []
    if retrieved.source is not None:
        column, places = retrieved.source.contiguous()
        return [column.index_select(0, places).to(like)]
    return [cast("Tensor", retrieved.rows.projected).to(like)]


def _alike(column: Tensor, like: Tensor) -> bool:
    return column.dtype == like.dtype and column.device == like.device


def _padded(parts: Sequence[Tensor], rows: int, like: Tensor, size: int) -> Tensor:
    """Return ``[rows, w]``: one stream's parts, with zeros behind."""
    present = sum(part.shape[0] for part in parts)
    if present == rows and len(parts) == 1:
        return parts[0]
    return torch.cat([*parts, like.new_zeros(rows - present, size)])


def with_lengths(segment: Segment, counts: Sequence[int]) -> Segment:
    """Return a segment that says how many rows each stream has, where these are not equally many."""
    if len(set(counts)) == 1:
        return segment
    return evolve(segment, lengths=torch.tensor(counts, device=segment.keys.device))
