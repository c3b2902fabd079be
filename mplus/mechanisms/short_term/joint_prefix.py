"""What a read of many memories at once has of each one's own: its short-term rows, rotated by whoever read it first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import define
from torch import Tensor

from mplus.backends.base import Segment
from mplus.mechanisms.short_term.prefix_cache import Prepared, Sizes, with_lengths
from mplus.memory.state import StreamView


@define(eq=False)
class JointPrepared(Prepared):
    """Serves one read of many memories; what it makes of their short-term rows is kept with each memory.

    Attributes:
        own: what each memory has prepared, one per stream.
    """

    own: Sequence[Prepared] = ()

    def short_term_segment(self, layer: int, views: Sequence[StreamView], sizes: Sizes, like: Tensor) -> Segment:
        copies = len(views) // len(self.own)
        parts = [
            self.own[place // copies].short_term_segment(layer, [view], ([front], [count], [tail]), like)
            for place, (view, front, count, tail) in enumerate(zip(views, *sizes, strict=True))
        ]
        if all(part is parts[0] for part in parts):  # several texts that read one memory
            return parts[0]
        return side_by_side(parts)


def side_by_side(parts: Sequence[Segment]) -> Segment:
    """Return the rows of several streams, ``[1, Hkv, n_i, D]`` each, as one segment; shorter ones get filler behind."""
    counts = [part.keys.shape[2] for part in parts]
    return with_lengths(Segment(_stacked([p.keys for p in parts]), _stacked([p.values for p in parts])), counts)


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    most = max(part.shape[2] for part in parts)
    if all(part.shape[2] == most for part in parts):
        return torch.cat(list(parts))
    _, heads, _, width = parts[0].shape
    whole = parts[0].new_zeros(len(parts), heads, most, width)
    for row, part in zip(whole, parts, strict=True):
        row[:, : part.shape[2]] = part[0]
    return whole
