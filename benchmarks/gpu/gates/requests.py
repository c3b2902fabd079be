"""Attention requests of every kind, moved to a device or widened, and their attention computed plainly."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from attrs import evolve
from torch import Tensor

from mplus.backends.base import AttentionRequest, Segment
from mplus.backends.joined import joined_bias, joined_keys_values, joined_visibility
from mplus.backends.reference import ReferenceBackend
from mplus.testing.drawing import RequestShape

NO_FILLERS = ("none", "none")
SHAPES: Mapping[str, RequestShape] = {
    "memory": RequestShape(queries=5, past=0, segments=(21,), width=20, value_width=18),
    "one query": RequestShape(queries=1, past=70, segments=(600, 64), fillers=NO_FILLERS, width=64, value_width=64),
    "many queries": RequestShape(batch=1, groups=4, queries=130, past=9, segments=(257,), width=64, value_width=64),
    "fillers": RequestShape(batch=3, queries=3, segments=(20, 19), fillers=("some", "all")),
    "shared": RequestShape(batch=3, queries=4, segments=(33,), shared=True, width=32, value_width=32),
    "padding": RequestShape(batch=3, queries=7, past=3, padding=4, segments=(9,)),
    "window": RequestShape(queries=40, past=20, window=7, segments=(18,), width=16, value_width=16),
    "softcap": RequestShape(queries=6, softcap=1.5, segments=(7,)),
    "bias": RequestShape(batch=2, queries=5, segments=(17,), fillers=("some",), bias="all"),
    "sinks": RequestShape(queries=5, segments=(11,), sinks=True),
    "heads of 128": RequestShape(queries=17, segments=(40,), width=128, value_width=128),
    "heads of 256": RequestShape(queries=17, segments=(40,), width=256, value_width=256),
    "no memory": RequestShape(queries=9, past=0, segments=(), fillers=()),
    "mask": RequestShape(queries=6, segments=(12,), mask="bool", per_head=True),
    "added mask": RequestShape(queries=6, segments=(12,), mask="additive"),
}  # fmt: skip
FEW = ("memory", "fillers")
LEARNING = ("memory", "fillers", "shared", "window", "bias", "heads of 128")
"""Shapes that gradients are taken for."""


def mapped(request: AttentionRequest, change: Callable[[Tensor], Tensor]) -> AttentionRequest:
    """Return the request with every tensor changed."""

    def changed(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else change(tensor)

    return evolve(
        request,
        queries=change(request.queries),
        keys=change(request.keys),
        values=change(request.values),
        mask=changed(request.mask),
        padding=changed(request.padding),
        sinks=changed(request.sinks),
        segments=tuple(
            Segment(change(one.keys), change(one.values), changed(one.lengths), changed(one.bias))
            for one in request.segments
        ),
    )


def on(request: AttentionRequest, device: torch.device) -> AttentionRequest:
    """Return the request on a device."""
    return mapped(request, lambda tensor: tensor.to(device))


def widened(request: AttentionRequest) -> AttentionRequest:
    """Return the request in float64."""
    return mapped(request, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)


def exact_attention(request: AttentionRequest) -> Tensor:
    """Attend in float64, by the backend that is the specification of the others; where the request is."""
    return ReferenceBackend().attend(widened(request)).output


def plain_attention(request: AttentionRequest) -> Tensor:
    """Attend with ordinary operations in the dtype of the request: the precision that one may expect."""
    groups = request.queries.shape[1] // request.keys.shape[1]
    keys, values = (part.repeat_interleave(groups, dim=1) for part in joined_keys_values(request))
    scores = request.queries @ keys.mT * request.scale
    if request.softcap is not None:
        scores = request.softcap * torch.tanh(scores / request.softcap)
    bias = joined_bias(request)
    scores = scores if bias is None else scores + bias.to(scores.dtype)
    visible = joined_visibility(request)
    # A row that sees nothing is computed as one that sees everything, and cleared: NaN must not get into gradients.
    blind = ~visible.any(-1, keepdim=True)
    scores = scores.masked_fill(~(visible | blind), -torch.inf)
    if request.sinks is not None:
        scores = torch.cat([scores, request.sinks[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1)[..., : keys.shape[2]].masked_fill(blind, 0)
    return weights @ values
