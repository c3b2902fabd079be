"""What a read of many memories puts in front of its texts: what each memory has ready, and what it retrieved."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import define
from torch import Tensor

from mplus.backends.base import Segment
from mplus.backends.checks import check_finite
from mplus.errors import InputError, ReadTogetherError
from mplus.mechanisms.opened import Retrieved
from mplus.mechanisms.short_term.prefix_cache import Prepared, Sizes, in_front, with_lengths
from mplus.mechanisms.short_term.state import state_of
from mplus.memory.state import StreamView


@define(eq=False)
class JointPrepared(Prepared):
    """Serves one read of many memories; what it makes of their short-term rows is kept with each memory.

    Attributes:
        own: what each memory has prepared, one per stream.
    """

    own: Sequence[Prepared] = ()

    def segments(
        self,
        layer: int,
        views: Sequence[StreamView],
        retrieved: Sequence[Retrieved | None],
        begins: Sequence[bool],
        like: Tensor,
        tails: Sequence[int] = (),
    ) -> tuple[Segment, ...]:
        counts = [len(state_of(view).stm[layer]) for view in views]
        sizes = (in_front(retrieved, begins), counts, tails or [0] * len(views))
        front = self._front_of_all(layer, retrieved, begins, sizes, like)
        segments = (front, self._short_term_of_all(layer, views, sizes, like))
        return tuple(segment for segment in segments if segment.keys.shape[2])

    def _front_of_all(
        self, layer: int, retrieved: Sequence[Retrieved | None], begins: Sequence[bool], sizes: Sizes, like: Tensor
    ) -> Segment:
        """Return ``[begin | retrieved]`` of every stream; filler of zeros behind shorter ones."""
        counts = sizes[0]
        rows = like.new_zeros(len(counts), max(counts), self.projection.size)
        if any(begins):
            begin = self.own[0].begin_row(layer).to(like)
            rows[:, 0] = begin if all(begins) else begin * torch.tensor(begins, device=like.device)[:, None]
        hidden: dict[int, list[int]] = {}
        for row, (found, there) in enumerate(zip(retrieved, begins, strict=True)):
            if found is None or not len(found.rows):
                continue
            if found.source is None and found.rows.projected is None:
                hidden.setdefault(len(found.rows), []).append(row)
            else:
                _put(found, rows[row, int(there) : counts[row]])
        for count, some in hidden.items():
            states = torch.stack([retrieved[row].rows.need_hidden() for row in some])  # type: ignore[union-attr]
            projected = self.projection.rows(layer, states.to(like))
            for row, own in zip(some, projected, strict=True):
                rows[row, counts[row] - count : counts[row]] = own
        self._check(rows)
        segment = self.projection.turned(layer, [rows], self._tables(layer, max(counts), sizes, like))
        return with_lengths(segment, counts)

    def _check(self, rows: Tensor) -> None:
        """Raise ReadTogetherError, which says whose, where a number of ``rows`` ``[B, P, w]`` is NaN or infinite."""
        try:
            check_finite("long-term memory", rows)
        except InputError:
            errors: dict[int, Exception] = {}
            for place, own in enumerate(rows):
                try:
                    check_finite("long-term memory", own)
                except InputError as error:
                    errors[place] = error
            raise ReadTogetherError.of(errors, len(rows)) from None

    def _short_term_of_all(self, layer: int, views: Sequence[StreamView], sizes: Sizes, like: Tensor) -> Segment:
        parts: list[Segment] = []
        errors: dict[int, Exception] = {}
        for place, (own, view, front, count, tail) in enumerate(zip(self.own, views, *sizes, strict=True)):
            try:
                parts.append(own.short_term_segment(layer, [view], ([front], [count], [tail]), like))
            except InputError as error:
                errors[place] = error
        if errors:
            raise ReadTogetherError.of(errors, len(views))
        if all(part is parts[0] for part in parts):  # several texts that read one memory
            return parts[0]
        return side_by_side(parts)


def side_by_side(parts: Sequence[Segment]) -> Segment:
    """Return the rows of several streams, ``[1, Hkv, n_i, D]`` each, as one segment; shorter ones get filler behind."""
    counts = [part.keys.shape[2] for part in parts]
    return with_lengths(Segment(_stacked([p.keys for p in parts]), _stacked([p.values for p in parts])), counts)


def _put(found: Retrieved, place: Tensor) -> None:
    """Copy the keys and values of retrieved rows to ``place`` ``[n, w]``."""
    if found.source is None:
        place.copy_(found.rows.projected)  # type: ignore[arg-type]
        return
    found.source.copy_to(place)


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    most = max(part.shape[2] for part in parts)
    if all(part.shape[2] == most for part in parts):
        return torch.cat(list(parts))
    _, heads, _, width = parts[0].shape
    whole = parts[0].new_zeros(len(parts), heads, most, width)
    for row, part in zip(whole, parts, strict=True):
        row[:, : part.shape[2]] = part[0]
    return whole
