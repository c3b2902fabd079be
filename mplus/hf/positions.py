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

    def of_memory(self, rows: int, valid: Tensor | None, text_offset: int | Tensor, device: torch.device) -> Tensor:
        """``[B or 1, P]`` int64 positions of ``rows`` right-aligned rows (filler rows get any).

        ``valid`` is ``[B, P]`` bool or None; ``text_offset`` the position of the first text token,
        one for all or ``[B, 1]``.
        """
        if self.layout != "compressed" or valid is None:
            place = self._of_row(rows, rows, device)[None] + text_offset
        else:
            place = torch.stack([self._of_row(rows, int(real), device) for real in valid.sum(1)]) + text_offset
        # Filler in front of a short stream would get negative positions, which not every decoder has.
        return place.clamp(min=0) if self.offset else place

    def _of_row(self, rows: int, real: int, device: torch.device) -> Tensor:
        place = torch.arange(-rows, 0, device=device)
        if self.layout == "constant":
            return torch.full_like(place, -1)
        if self.layout == "compressed":
            # The last ``real`` places keep their order within ``span`` positions; what fits is not squeezed.
            span = min(real, self.span or real)
            return ((place + real) * span).div(max(real, 1), rounding_mode="floor") - span
        return place

    def extent(self, rows: int) -> int:
        """How many positions in front of the text ``rows`` memory rows take."""
        if self.layout == "constant":
            return min(rows, 1)
        return min(rows, self.span) if self.layout == "compressed" and self.span is not None else rows
