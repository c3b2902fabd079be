"""Attention by the kernel, differentiable; and what the kernel computes, in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import attrs
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mplus.backends.base import AttentionRequest, Segment
from mplus.backends.joined import joined_bias, joined_keys_values, joined_visibility
from mplus.backends.partial_backward import (
    Visibility,
    memory_visibility,
    partial_backward,
    row_products,
    sink_gradient,
    text_visibility,
)
from mplus.backends.triton.configs import Tiles, attention_tiles, splits_for


def plain_attention(request: AttentionRequest) -> tuple[Tensor, Tensor]:
    """Compute what the kernel must: output ``[B, H, T, Dv]`` and log-sum-exp ``[B, H, T]``, without sinks.

    In the dtype of the queries, at least float32. Where a query sees nothing, the output is 0 and the sum -inf.
    """
    dtype = torch.promote_types(request.queries.dtype, torch.float32)
    groups = request.queries.shape[1] // request.keys.shape[1]
    keys, values = (part.to(dtype).repeat_interleave(groups, dim=1) for part in joined_keys_values(request))
    scores = request.queries.to(dtype) @ keys.mT * request.scale
    if request.softcap is not None:
        scores = request.softcap * torch.tanh(scores / request.softcap)
    bias = joined_bias(request)
    scores = scores if bias is None else scores + bias
    scores = scores.masked_fill(~joined_visibility(request), -torch.inf)
    log_sums = scores.logsumexp(-1)
    return (scores - log_sums[..., None]).exp().nan_to_num(0.0) @ values, log_sums


def merge(outputs: Tensor, log_sums: Tensor) -> tuple[Tensor, Tensor]:
    """Merge attention over parts of the keys into exact attention over all of them.

    Args:
        outputs: ``[parts, B, H, T, Dv]``.
        log_sums: ``[parts, B, H, T]``, -inf where a part has no key that the query sees.

    Returns:
        ``[B, H, T, Dv]`` and ``[B, H, T]``; 0 and -inf where no part has one.
    """
    whole = log_sums.logsumexp(0)
    shares = (log_sums - whole.masked_fill(whole == -torch.inf, 0)).exp()
    return (outputs * shares[..., None]).sum(0), whole


def forward(
    request: AttentionRequest, *, splits: int | None = None, tiles: Tiles | None = None
) -> tuple[Tensor, Tensor]:
    """Run the kernel: output ``[B, H, T, Dv]`` in the dtype of the queries, log-sum-exp ``[B, H, T]`` float32.

    Sinks are included in both.

    Args:
        splits: into how many parts the keys are split; None: as many as keep the device busy.
        tiles: None: those the kernel ships with.
    """
    from mplus.backends.triton.kernels.attention import launch
    from mplus.backends.triton.kernels.shared import needs_upcast

    request = attrs.evolve(
        request, queries=_adjacent(request.queries), keys=_adjacent(request.keys), values=_adjacent(request.values)
    )
    queries, keys, values = request.queries, request.keys, request.values
    batch, heads, length, width = queries.shape
    segments = tuple(
        Segment(_adjacent(segment.keys), _adjacent(segment.values), segment.lengths, segment.bias)
        for segment in request.segments
        if segment.keys.shape[2]
    )
    rows = length * (heads // keys.shape[1])
    if tiles is None:
        tiles = attention_tiles(queries.dtype.itemsize * 8, max(width, values.shape[3]), rows)
    if splits is None:
        programs = -(-rows // tiles.rows) * batch * keys.shape[1]
        blocks = sum(-(-segment.keys.shape[2] // tiles.keys) for segment in segments) - (-keys.shape[2] // tiles.keys)
        # Programs that the device runs at a time, at least; 1 where kernels are interpreted.
        processors = torch.cuda.get_device_properties(queries.device).multi_processor_count if queries.is_cuda else 1
        splits = splits_for(programs, blocks, processors)
    # What is added up or scaled afterwards is rounded once, at the end.
    rounded_by_kernel = splits == 1 and request.sinks is None and not needs_upcast(queries.dtype)
    outputs = queries.new_empty(
        (splits, batch, heads, length, values.shape[3]), dtype=queries.dtype if rounded_by_kernel else torch.float32
    )
    log_sums = queries.new_empty((splits, batch, heads, length), dtype=torch.float32)
    launch(request, segments, outputs, log_sums, tiles)
    output, log_sum = (outputs[0], log_sums[0]) if splits == 1 else merge(outputs, log_sums)
    if request.sinks is not None:  # they join the sum, and take their share of the weight away
        column = request.sinks.to(log_sum)[:, None]
        output = output * torch.sigmoid(log_sum - column)[..., None]
        log_sum = torch.logaddexp(log_sum, column.expand_as(log_sum))
    return output.to(queries.dtype), log_sum


def attend(request: AttentionRequest) -> Tensor:
    """Return the output ``[B, H, T, Dv]`` in the dtype of the queries; it can be differentiated once."""
    parts = [part for segment in request.segments for part in (segment.keys, segment.values, segment.bias)]
    apply: Callable[..., Tensor] = _Attention.apply
    return apply(request, request.queries, request.keys, request.values, request.sinks, *parts)


class _Context(Protocol):
    """The things that the forward of ``_Attention`` leaves for its backward."""

    segments: int
    scale: float
    softcap: float | None
    window: int | None
    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


class _Attention(torch.autograd.Function):
    """Forward by the kernel, backward in torch, one part of the keys after the other."""

    @staticmethod
    def forward(ctx: _Context, request: AttentionRequest, *tensors: Tensor | None) -> Tensor:
        output, log_sums = forward(request)
        ctx.save_for_backward(
            output, log_sums, request.padding, *[segment.lengths for segment in request.segments], *tensors
        )
        ctx.segments = len(request.segments)
        ctx.scale, ctx.softcap, ctx.window = request.scale, request.softcap, request.window
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        output, log_sums, padding, *rest = ctx.saved_tensors
        lengths, (queries, keys, values, sinks, *memory) = rest[: ctx.segments], rest[ctx.segments :]
        delta = row_products(grad_output, output)
        text = text_visibility(queries.shape[2], keys.shape[2], queries.device, window=ctx.window, padding=padding)
        parts: list[tuple[Tensor, Tensor, Tensor | None, Visibility]] = [(keys, values, None, text)]
        for index, count in enumerate(lengths):
            own = memory[3 * index : 3 * index + 3]  # the keys, values and bias of a segment
            parts.append((own[0], own[1], own[2], memory_visibility(count)))
        grad_queries = torch.zeros_like(delta[..., None])
        gradients: list[Tensor | None] = []
        for part_keys, part_values, bias, visible in parts:
            grad_part, *grads = partial_backward(
                grad_output,
                queries,
                part_keys,
                part_values,
                delta,
                log_sums,
                scale=ctx.scale,
                softcap=ctx.softcap,
                visible=visible,
                bias=bias,
            )
            grad_queries = grad_queries + grad_part
            gradients += [
                None if grad is None or part is None else grad.to(part.dtype)
                for grad, part in zip(grads, (part_keys, part_values, bias), strict=True)
            ]
        grad_sinks = None if sinks is None else sink_gradient(sinks, delta, log_sums).to(sinks.dtype)
        return (None, grad_queries.to(queries.dtype), *gradients[:2], grad_sinks, *gradients[3:])


def _adjacent(part: Tensor) -> Tensor:
    return part if part.stride(-1) == 1 else part.contiguous()
