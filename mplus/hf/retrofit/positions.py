"""Where memory rows sit on the position axis, and turning their keys to it (RoPE) as the decoder itself would have.

Rows that are kept as hidden states are rotated by the layer's own modules: ``Retrofit.project`` in ``hooks.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, TypeVar

import torch
from attrs import define
from torch import Tensor

from mplus.hf.retrofit.discovery import AttentionSpec, Embeddings
from mplus.mechanisms.decoder import Tables

T = TypeVar("T")


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
        """Return ``[B or 1, P]`` int64 positions of memory rows (those of filler rows do not matter).

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
        """Return the number of positions in front of the text that ``rows`` memory rows take."""
        if self.layout == "constant":
            return min(rows, 1)
        return min(rows, self.span) if self.layout == "compressed" and self.span is not None else rows


def rotary_at(spec: AttentionSpec, like: Tensor, positions: Tensor) -> Embeddings | None:
    """Return the rotary embeddings of the decoder at ``positions`` ``[B or 1, P]`` int64; None: it has none.

    Dtype and device are those of ``like``. The recorded call is repeated with its tensors exchanged: floating ones by
    ``like``, whole numbers by ``positions``.
    """
    if spec.rotary is None:
        return None

    def swap(value: T) -> T | Tensor:
        if not isinstance(value, Tensor):
            return value
        return like if value.is_floating_point() else positions

    args, kwargs = spec.rotary_call.args, spec.rotary_call.kwargs
    embeddings: Embeddings = spec.rotary(*map(swap, args), **{key: swap(value) for key, value in kwargs.items()})
    return embeddings


@define(frozen=True)
class Rotation:
    """The rotation of one attention layer's keys.

    Attributes:
        pairs: which numbers of a head turn together: i and i + R/2 ("half"), 2i and 2i + 1 ("interleaved"), or "none".
        doubled: its tables have one column per pair, not one per number.
        scale: what the rotary module multiplies by besides (1, but for yarn); keys that were kept have it already.
    """

    pairs: Literal["none", "half", "interleaved"]
    doubled: bool = False
    scale: float = 1.0

    def tables(self, spec: AttentionSpec, like: Tensor, positions: Tensor) -> Tables | None:
        """Return tables for ``positions`` ``[B or 1, P]`` in dtype and device of ``like``; None: nothing is rotated."""
        embeddings = None if self.pairs == "none" else rotary_at(spec, like, positions)
        if embeddings is None:
            return None
        cos, sin = embeddings
        if self.doubled:
            cos, sin = (
                torch.cat([table, table], -1) if self.pairs == "half" else table.repeat_interleave(2, -1)
                for table in (cos, sin)
            )
        return (cos, sin) if self.scale == 1.0 else (cos / self.scale, sin / self.scale)

    def apply(self, keys: Tensor, tables: Tables | None, out: Tensor) -> Tensor:
        """Rotate ``keys`` ``[B, Hkv, P, D]`` into ``out`` of the same shape."""
        if tables is None:
            return out.copy_(keys)
        cos, sin = (table[:, None] for table in tables)
        width = cos.shape[-1]
        if self.pairs == "half":
            first, second = slice(0, width // 2), slice(width // 2, width)
        else:
            first, second = slice(0, width, 2), slice(1, width, 2)
        # Of each pair (x, y): x cos - y sin and y cos + x sin. Numbers behind the tables' width are not turned.
        turned = keys[..., :width]
        if torch.is_grad_enabled() and turned.requires_grad:
            out[..., :width] = turned * cos  # autograd cannot follow ``out=``
        else:
            torch.mul(turned, cos, out=out[..., :width])
        out[..., first].addcmul_(turned[..., second], sin[..., first], value=-1)
        out[..., second].addcmul_(turned[..., first], sin[..., second])
        if width < keys.shape[-1]:
            out[..., width:].copy_(keys[..., width:])
        return out


def find_rotation(
    spec: AttentionSpec, still: Tensor, turned: Tensor, like: Tensor, positions: Tensor
) -> Rotation | str:
    """Find the rotation that makes ``turned`` of ``still``, or say why none does.

    Args:
        spec: the attention layer.
        still: ``[1, Hkv, P, D]``, its keys of P rows at position 0.
        turned: the same at ``positions``.
        like: hidden states, for dtype and device.
        positions: ``[1, P]`` int64.
    """
    # By the largest key, since rotation mixes pairs of numbers of unlike size.
    tolerance = (1e-4 if still.dtype in (torch.float32, torch.float64) else 3e-2) * float(still.abs().max())
    for rotation in _candidates(spec, like):
        try:
            made = rotation.apply(still, rotation.tables(spec, like, positions), torch.empty_like(still))
        except (RuntimeError, TypeError, ValueError):
            continue  # tables of another form
        if bool((made - turned).abs().max() <= tolerance):
            return rotation
    return f"{type(spec.attention).__name__} of layer {spec.layer_index} turns its keys in a way that is not known"


def _candidates(spec: AttentionSpec, like: Tensor) -> Iterator[Rotation]:
    yield Rotation("none")
    found = rotary_at(spec, like, torch.zeros(1, 1, dtype=torch.int64, device=like.device))
    if not isinstance(found, tuple | list) or len(found) != 2 or not all(isinstance(t, Tensor) for t in found):
        return
    cos, sin = found
    scale = float(cos.flatten()[0])
    # At position 0 a rotation is the identity, so what the cosines say there is the scale alone.
    if cos.dim() != 3 or not scale > 0 or bool((cos - scale).abs().max() > 1e-3 * scale) or bool(sin.any()):
        return
    # Cosines in float32 are 1 but for rounding; YaRN scales them on purpose.
    scale = 1.0 if abs(scale - 1) < 1e-6 else scale
    for doubled in (False, True):
        for pairs in ("half", "interleaved"):
            yield Rotation(pairs, doubled, scale)
