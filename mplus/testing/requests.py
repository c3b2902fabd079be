"""Attention requests made from others, and what is in them: for the suite of attention backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import attrs
import torch

from mplus.backends.base import AttentionRequest, Segment
from mplus.backends.checks import tensors_of
from mplus.testing import rounding

if TYPE_CHECKING:
    from torch import Tensor


def with_fillers(request: AttentionRequest, value: float) -> tuple[Segment, ...]:
    """Return the segments with ``value`` in every filler row."""
    segments = []
    for segment in request.segments:
        valid = segment.valid
        if valid is None:
            segments.append(segment)
            continue
        filler = ~valid[:, None, :, None]
        segments.append(
            attrs.evolve(
                segment,
                keys=segment.keys.masked_fill(filler, value),
                values=segment.values.masked_fill(filler, value),
            )
        )
    return tuple(segments)


def batch_row(request: AttentionRequest, row: int) -> AttentionRequest:
    """Return the request of one batch row alone."""

    def pick(tensor: Tensor) -> Tensor:
        return tensor if tensor.shape[0] == 1 else tensor[row : row + 1]

    return attrs.evolve(
        request,
        queries=pick(request.queries),
        keys=pick(request.keys),
        values=pick(request.values),
        mask=None if request.mask is None else pick(request.mask),
        segments=tuple(
            Segment(
                pick(s.keys),
                pick(s.values),
                None if s.lengths is None else s.lengths[row : row + 1],
                None if s.bias is None else pick(s.bias),
            )
            for s in request.segments
        ),
        padding=None if request.padding is None else request.padding[row : row + 1],
    )


def nudged(request: AttentionRequest) -> AttentionRequest:
    """Return the request with every query, key, value and bias moved by a unit in the last place."""

    def move(values: Tensor) -> Tensor:
        return rounding.nudged(values, values.dtype, seed=1).to(values)

    return attrs.evolve(
        request,
        queries=move(request.queries),
        keys=move(request.keys),
        values=move(request.values),
        segments=tuple(
            attrs.evolve(s, keys=move(s.keys), values=move(s.values), bias=None if s.bias is None else move(s.bias))
            for s in request.segments
        ),
    )


def with_learned_bias(request: AttentionRequest) -> AttentionRequest:
    """Return the request with every bias of memory asking for a gradient."""
    segments = tuple(
        segment if segment.bias is None else attrs.evolve(segment, bias=segment.bias.clone().requires_grad_())
        for segment in request.segments
    )
    return attrs.evolve(request, segments=segments)


def gradients_of(
    request: AttentionRequest, attend: Callable[[AttentionRequest], Tensor], *also: str
) -> dict[str, Tensor]:
    """Return gradients of a weighted sum of the output towards queries, keys and values, and what ``also`` names."""
    leaves = {
        name: tensor.clone().requires_grad_()
        for name, tensor in tensors_of(request).items()
        if name.endswith(("keys", "queries", "values", *also))
    }
    segments = tuple(
        attrs.evolve(
            segment,
            keys=leaves[f"segments[{index}].keys"],
            values=leaves[f"segments[{index}].values"],
            bias=leaves.get(f"segments[{index}].bias", segment.bias),
        )
        for index, segment in enumerate(request.segments)
    )
    output = attend(
        attrs.evolve(
            request, queries=leaves["queries"], keys=leaves["keys"], values=leaves["values"], segments=segments
        )
    )
    if not output.requires_grad:  # no query saw anything
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(3)).to(output)
    with torch.autograd.set_detect_anomaly(mode=True):  # NaN must not appear on the way either
        found = torch.autograd.grad((output * weight).sum(), list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
    }
