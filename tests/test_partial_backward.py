"""Gradients part by part are those of the whole attention."""

from __future__ import annotations

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mplus.backends.base import Segment
from mplus.backends.partial_backward import (
    memory_visibility,
    partial_backward,
    row_products,
    sink_gradient,
    text_visibility,
)
from mplus.backends.reference import ReferenceBackend
from mplus.backends.triton.attention import plain_attention
from mplus.testing.strategies import CONFORMANCE, RequestShape, request_shapes


def parts_of(request):
    """(keys, values, visible) of the text and of every segment."""
    length, text = request.queries.shape[2], request.keys.shape[2]
    visible = text_visibility(length, text, request.queries.device, window=request.window, padding=request.padding)
    memory = [(s.keys, s.values, memory_visibility(s.lengths)) for s in request.segments]
    return [(request.keys, request.values, visible), *memory]


def leaves_of(request):
    pairs = [part for keys, values, _ in parts_of(request) for part in (keys, values)]
    return [request.queries, *pairs, *([] if request.sinks is None else [request.sinks])]


def rebuilt(request, leaves):
    queries, keys, values, *rest = leaves
    count = len(request.segments)
    segments = tuple(Segment(*rest[2 * i : 2 * i + 2], request.segments[i].lengths) for i in range(count))
    sinks = rest[2 * count] if request.sinks is not None else None
    return attrs.evolve(request, queries=queries, keys=keys, values=values, sinks=sinks, segments=segments)


def merged(request):
    """Output and log-sum-exp of the whole attention, sinks included."""
    output, log_sums = plain_attention(request)
    if request.sinks is not None:
        column = request.sinks[:, None].expand_as(log_sums)
        output = output * torch.sigmoid(log_sums - column)[..., None]
        log_sums = torch.logaddexp(log_sums, column)
    return output, log_sums


def gradients(request, grad_output, chunk):
    output, log_sums = merged(request)
    delta = row_products(grad_output, output)
    total, found = torch.zeros_like(request.queries), []
    for keys, values, visible in parts_of(request):
        grad_queries, *pair = partial_backward(
            grad_output,
            request.queries,
            keys,
            values,
            delta,
            log_sums,
            scale=request.scale,
            softcap=request.softcap,
            visible=visible,
            chunk=chunk,
        )
        total += grad_queries
        found += pair
    sinks = [] if request.sinks is None else [sink_gradient(request.sinks, delta, log_sums)]
    return [total, *found, *sinks]


@CONFORMANCE
@given(
    shape=request_shapes(mask="causal"),
    sinks=st.booleans(),
    softcap=st.sampled_from([None, 1.5]),
    chunk=st.sampled_from([2, 3, 1024]),
)
def test_gradients_are_those_of_the_reference(shape, sinks, softcap, chunk):
    """Window, padding, ragged lengths, NaN in fillers, shared segments and groups; parts cut into chunks."""
    request = attrs.evolve(shape, sinks=sinks, softcap=softcap).build(torch.float64)
    leaves = [leaf.clone().requires_grad_() for leaf in leaves_of(request)]
    output = ReferenceBackend().attend(rebuilt(request, leaves)).output
    weight = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad((output * weight).sum(), leaves)
    for found, wanted in zip(gradients(request, weight, chunk), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-11, rtol=1e-11)


class Parts(torch.autograd.Function):
    """Attention whose backward goes part by part."""

    @staticmethod
    def forward(ctx, request, *leaves):
        ctx.request = rebuilt(request, [leaf.detach() for leaf in leaves])
        return merged(ctx.request)[0]

    @staticmethod
    def backward(ctx, grad_output):
        return (None, *gradients(ctx.request, grad_output, 2))


@pytest.mark.parametrize(
    "shape",
    [
        RequestShape(batch=1),
        RequestShape(segments=(3, 0, 2), fillers=("some", "none", "none"), window=2, seed=4),
        RequestShape(shared=True, padding=2, softcap=1.5, sinks=True),
    ],
    ids=["plain", "ragged", "everything"],
)
def test_gradcheck(shape):
    request = shape.build(torch.float64)
    request = attrs.evolve(
        request,
        segments=tuple(Segment(s.keys.nan_to_num(), s.values.nan_to_num(), s.lengths) for s in request.segments),
    )
    leaves = [leaf.clone().requires_grad_() for leaf in leaves_of(request)]
    assert torch.autograd.gradcheck(lambda *parts: Parts.apply(request, *parts), leaves)


def test_part_by_part_with_sums_of_its_own_would_be_wrong():
    """Why a part is given the log-sum-exp of the whole."""
    request = RequestShape().build(torch.float64)
    weight = torch.ones_like(request.queries)
    right = gradients(request, weight, 8)[0]
    alone = gradients(attrs.evolve(request, segments=()), weight, 8)[0]
    assert not torch.allclose(right, alone)


def test_a_mask_per_head():
    request = RequestShape(mask="bool", per_head=True, segments=(), fillers=()).build(torch.float64)
    leaves = [leaf.clone().requires_grad_() for leaf in leaves_of(request)]
    output = ReferenceBackend().attend(rebuilt(request, leaves)).output
    expected = torch.autograd.grad(output.sum(), leaves)
    whole, log_sums = plain_attention(request)
    weight = torch.ones_like(output)
    found = partial_backward(
        weight,
        request.queries,
        request.keys,
        request.values,
        row_products(weight, whole),
        log_sums,
        scale=request.scale,
        visible=lambda start, stop: request.mask[..., start:stop],
        chunk=2,
    )
    for gradient, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_under_autocast_too(dtype):
    request = RequestShape().build(dtype)
    weight = torch.ones_like(request.queries)
    plain = gradients(request, weight, 1024)
    output, log_sums = merged(request)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = partial_backward(
            weight,
            request.queries,
            request.keys,
            request.values,
            row_products(weight, output),
            log_sums,
            scale=request.scale,
            visible=parts_of(request)[0][2],
        )
    assert all(part.dtype == torch.float32 for part in found)
    assert torch.equal(found[1], plain[1])
