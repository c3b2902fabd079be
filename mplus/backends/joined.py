"""Memory and text as one sequence of keys, for backends that attend to them in one call."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mplus.backends.base import AttentionRequest, Segment


def joined_keys_values(request: AttentionRequest) -> tuple[Tensor, Tensor]:
    """Join keys to ``[B, Hkv, P+S, D]`` and values to ``[B, Hkv, P+S, Dv]``: memory, then text; zeros at filler rows.

    Filler rows may hold anything. NaN times a weight of zero is NaN, so it does not suffice to mask them.
    """
    if not request.segments:
        return request.keys, request.values
    if request.joined is not None:
        return request.joined.keys_values()
    batch = request.queries.shape[0]
    keys, values = [], []
    for segment in request.segments:
        memory_keys = segment.keys.expand(batch, -1, -1, -1)
        memory_values = segment.values.expand(batch, -1, -1, -1)
        valid = segment.valid
        if valid is not None:
            filler = ~valid[:, None, :, None]
            memory_keys = memory_keys.masked_fill(filler, 0)
            memory_values = memory_values.masked_fill(filler, 0)
        keys.append(memory_keys)
        values.append(memory_values)
    return torch.cat([*keys, request.keys], dim=2), torch.cat([*values, request.values], dim=2)


def joined_visibility(request: AttentionRequest) -> Tensor:
    """Return ``[1 or B, 1 or H, T, P+S]`` bool: which keys, memory and text, each query sees."""
    device = request.queries.device
    parts = [
        torch.ones(1, 1, 1, segment.keys.shape[2], dtype=torch.bool, device=device)
        if segment.valid is None
        else segment.valid[:, None, None]
        for segment in request.segments
    ]
    parts.append(text_visibility(request))
    batch = max(part.shape[0] for part in parts)
    heads, length = parts[-1].shape[1:3]
    return torch.cat([part.expand(batch, heads, length, -1) for part in parts], dim=-1)


def joined_bias(request: AttentionRequest) -> Tensor | None:
    """Return the numbers added to the scores, ``[1 or B, 1 or H, 1 or T, P+S]``; None: nothing is added.

    At memory that is ``Segment.bias``, at text what an additive mask says; 0 at fillers and masked text.
    """
    text = text_bias(request)
    memory = sum(segment.keys.shape[2] for segment in request.segments)
    if all(segment.bias is None for segment in request.segments):
        return None if text is None else torch.nn.functional.pad(text, (memory, 0))
    parts = [_segment_bias(request, segment) for segment in request.segments]
    if text is None:
        text = parts[0].new_zeros(1, 1, 1, request.keys.shape[2])
    sizes = torch.broadcast_shapes(*(part.shape[:3] for part in (*parts, text)))
    return torch.cat([part.expand(*sizes, -1) for part in (*parts, text)], dim=-1)


def text_bias(request: AttentionRequest) -> Tensor | None:
    """Return the numbers of an additive mask, ``[1 or B, 1 or H, T, S]``, 0 where it hides; None: no such mask."""
    if request.mask is None or request.mask.dtype == torch.bool:
        return None
    return _four_dimensions(request).masked_fill(~_masked_visibility(request), 0)


def _segment_bias(request: AttentionRequest, segment: Segment) -> Tensor:
    """Return the bias of one segment as ``[1 or B, 1 or H, 1, P]``, 0 at fillers."""
    if segment.bias is None:
        return request.queries.new_zeros(1, 1, 1, segment.keys.shape[2])
    bias, valid = segment.bias, segment.valid
    if bias.shape[1] > 1:
        bias = bias.repeat_interleave(request.queries.shape[1] // bias.shape[1], dim=1)
    return (bias if valid is None else bias.masked_fill(~valid[:, None], 0))[:, :, None]


def text_visibility(request: AttentionRequest) -> Tensor:
    """Return ``[1 or B, 1 or H, T, S]`` bool: which text keys each query sees."""
    visible = _masked_visibility(request)
    length, text = request.queries.shape[2], request.keys.shape[2]
    place = torch.arange(text, device=request.queries.device)
    if request.window is not None:
        own = torch.arange(text - length, text, device=request.queries.device)
        visible = visible & (place > own[:, None] - request.window)
    if request.padding is not None:
        visible = visible & (place >= request.padding[:, None])[:, None, None]
    return visible


def _masked_visibility(request: AttentionRequest) -> Tensor:
    length, text = request.queries.shape[2], request.keys.shape[2]
    if request.mask is None:
        ones = torch.ones(1, 1, length, text, dtype=torch.bool, device=request.queries.device)
        return ones.tril(text - length)
    mask = _four_dimensions(request)
    if mask.dtype == torch.bool:
        return mask
    # The smallest finite number stands for "masked", also after a bias was added to it or its dtype was widened.
    return mask > torch.finfo(mask.dtype).min / 2


def _four_dimensions(request: AttentionRequest) -> Tensor:
    """Return the mask as ``[1 or B, 1 or H, T, S]``."""
    assert request.mask is not None  # noqa: S101  (callers checked)
    mask = request.mask[(None,) * (4 - request.mask.ndim)]
    return mask.expand(-1, -1, request.queries.shape[2], request.keys.shape[2])
