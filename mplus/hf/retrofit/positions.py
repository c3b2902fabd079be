"""Where memory rows sit on the position axis."""

from __future__ import annotations

from typing import Literal

import torch
from attrs import define
from torch import Tensor


@define(frozen=True)
class MemoryPositions:
    """Positions of memory rows.

    Rotary embeddings are relative, so memory at -P..-1 with text at 0..T-1 equals memory at 0..P-1 with text behind it
    (M+ section 3.1), and nothing in the decoder's own positions, masks or caches has to change.

    Attributes:
        layout: "sequential"; "compressed" into ``span`` positions; or "constant", all right in front of the text.
        span: positions that "compressed" takes.
        offset: memory at 0..P-1 and text behind it, for rotary embeddings that depend on the largest position.
    """

    layout: Literal["sequential", "compressed", "constant"] = "sequential"
    span: int | None = None
    offset: bool = False

    def of_rows(self, place: Tensor, total: int | Tensor, text_offset: int | Tensor = 0) -> Tensor:
        """``[B or 1, P]`` int64 positions of memory rows (those of filler rows do not matter).

        Args:
            place: ``[P]`` or ``[B, P]`` int64: which rows, counted from the oldest of the stream.
            total: rows in front of the text, one number for all or ``[B, 1]``.
            text_offset: position of the first text token, one for all or ``[B, 1]``.
        """
        place = place if place.dim() == 2 else place[None]
        if self.layout == "constant":
            found = torch.full_like(place, -1)
        elif self.layout == "compressed" and self.span is not None:
            # Rows keep their order within ``span`` positions; what fits is not squeezed.
            count = torch.as_tensor(total, device=place.device)
            span = count.clamp(max=self.span)
            found = (place * span).div(count.clamp(min=1), rounding_mode="floor") - span
        else:
            found = place - total
        found = found + text_offset
        # Filler behind a short stream may get any position, but not every decoder has negative ones.
        return found.clamp(min=0) if self.offset else found

    def extent(self, rows: int) -> int:
        """How many positions in front of the text ``rows`` memory rows take."""
        if self.layout == "constant":
            return min(rows, 1)
        return min(rows, self.span) if self.layout == "compressed" and self.span is not None else rows
