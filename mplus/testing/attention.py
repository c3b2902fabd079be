"""Attention one query at a time: what every backend is compared with. Slow, and plain enough to be seen to be right."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mplus.backends.base import AttentionRequest


def exact_attention(request: AttentionRequest) -> tuple[Tensor, Tensor]:
    """Output ``[B, H, T, Dv]`` and weights ``[B, H, T, P+S]`` in float64, without dropout.

    For every query the keys it sees are collected first, so what it does not see cannot matter.
    """
    batch, heads, length, _ = request.queries.shape
    total = sum(segment.keys.shape[2] for segment in request.segments) + request.keys.shape[2]
    output = torch.zeros(batch, heads, length, request.values.shape[-1], dtype=torch.float64)
    weights = torch.zeros(batch, heads, length, total, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            keys, values = _head(request, b, h)
            for t in range(length):
                places, bias = _seen(request, b, h, t)
                if not places:
                    continue
                query = request.queries[b, h, t].double().cpu()
                logits = (keys[places] @ query) * request.scale
                if request.softcap is not None:
                    logits = request.softcap * torch.tanh(logits / request.softcap)
                logits = logits + torch.tensor(bias, dtype=torch.float64)
                if (added := _key_bias(request, b, h)) is not None:
                    logits = logits + added[places]
                if request.sinks is not None:
                    logits = torch.cat([logits, request.sinks[h].double().cpu()[None]])
                share = torch.softmax(logits, 0)[: len(places)]
                output[b, h, t] = share @ values[places]
                weights[b, h, t, places] = share
    return output, weights


def plain_attention(request: AttentionRequest) -> Tensor:
    """Attend in the request's own dtype with ordinary tensor operations: the precision that one may expect."""
    batch, heads, length, _ = request.queries.shape
    seen = torch.zeros(batch, heads, length, exact_attention(request)[1].shape[-1], dtype=request.queries.dtype)
    seen = seen.fill_(-torch.inf)
    keys, values = [], []
    for b in range(batch):
        for h in range(heads):
            for t in range(length):
                places, bias = _seen(request, b, h, t)
                seen[b, h, t, places] = torch.tensor(bias, dtype=seen.dtype)
                if (added := _key_bias(request, b, h)) is not None:
                    seen[b, h, t, places] += added[places].to(seen.dtype)
            head_keys, head_values = _head(request, b, h)
            keys.append(head_keys.to(seen.dtype).nan_to_num())
            values.append(head_values.to(seen.dtype).nan_to_num())
    all_keys = torch.stack(keys).view(batch, heads, *keys[0].shape)
    all_values = torch.stack(values).view(batch, heads, *values[0].shape)
    scores = request.queries.cpu() @ all_keys.transpose(-1, -2) * request.scale
    if request.softcap is not None:
        scores = request.softcap * torch.tanh(scores / request.softcap)
    blind = (seen == -torch.inf).all(-1, keepdim=True)
    scores = (scores + seen).masked_fill(blind, 0)  # a softmax of nothing is NaN, in the gradient too
    if request.sinks is not None:
        column = request.sinks.cpu()[None, :, None, None].expand(batch, heads, length, 1)
        scores = torch.cat([scores, column], -1)
    weights: Tensor = torch.softmax(scores, -1)[..., : seen.shape[-1]].masked_fill(blind, 0)
    return weights @ all_values


def _head(request: AttentionRequest, b: int, h: int) -> tuple[Tensor, Tensor]:
    """Keys and values of memory and text for one query head, float64 on the CPU."""
    head = h // (request.queries.shape[1] // request.keys.shape[1])
    keys = [segment.keys[b % segment.keys.shape[0], head] for segment in request.segments]
    values = [segment.values[b % segment.values.shape[0], head] for segment in request.segments]
    joined = torch.cat([*keys, request.keys[b, head]]), torch.cat([*values, request.values[b, head]])
    return joined[0].double().cpu(), joined[1].double().cpu()


def _key_bias(request: AttentionRequest, b: int, h: int) -> Tensor | None:
    """``[P+S]`` float64 on the CPU: what is added to the score of each key, 0 at text; None: nothing."""
    if all(segment.bias is None for segment in request.segments):
        return None
    head = h // (request.queries.shape[1] // request.keys.shape[1])
    parts = [
        torch.zeros(segment.keys.shape[2], dtype=torch.float64)
        if segment.bias is None
        else segment.bias[b % segment.bias.shape[0], head % segment.bias.shape[1]].double().cpu()
        for segment in request.segments
    ]
    return torch.cat([*parts, torch.zeros(request.keys.shape[2], dtype=torch.float64)])


def _seen(request: AttentionRequest, b: int, h: int, t: int) -> tuple[list[int], list[float]]:
    """Places of the keys that one query sees, and what the mask adds to their scores."""
    places, bias, start = [], [], 0
    for segment in request.segments:
        for row in range(segment.keys.shape[2]):
            if segment.lengths is None or row < int(segment.lengths[b]):
                places.append(start + row)
                bias.append(0.0)
        start += segment.keys.shape[2]
    length, text = request.queries.shape[2], request.keys.shape[2]
    for s in range(text):
        added = 0.0
        if request.mask is None:
            visible = s <= text - length + t
        else:
            entry = torch.broadcast_to(request.mask, (*request.queries.shape[:3], text))[b, h, t, s]
            if entry.dtype == torch.bool:
                visible = bool(entry)
            else:
                added = float(entry)
                visible = added > torch.finfo(entry.dtype).min / 2
        if request.window is not None:
            visible = visible and s > text - length + t - request.window
        if request.padding is not None:
            visible = visible and s >= int(request.padding[b])
        if visible:
            places.append(start + s)
            bias.append(added)
    return places, bias
