"""Gradients part by part are those of the whole attention."""

from __future__ import annotations

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mplus.backends import partial_backward as module
from mplus.backends.reference import ReferenceBackend
from mplus.testing.drawing import RequestShape
from mplus.testing.strategies import CONFORMANCE, request_shapes
from tests.helpers.gradients import (
    PART_CASES,
    check_equal,
    check_parts,
    gradients_by_parts,
    gradients_of,
    leaves_of,
    merged,
    rebuilt,
    weight_for,
    without_nan,
)

pytestmark = pytest.mark.two_computations


@pytest.mark.parametrize("name", PART_CASES)
def test_cases(name):
    check_parts(module, name)


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
    found = gradients_by_parts(module, request, weight_for(request), chunk)
    check_equal(found, gradients_of(ReferenceBackend(), request), 1e-11)


class Parts(torch.autograd.Function):
    """Attention whose backward goes part by part."""

    @staticmethod
    def forward(ctx, request, *leaves):
        ctx.request = rebuilt(request, [leaf.detach() for leaf in leaves])
        return merged(ctx.request)[0]

    @staticmethod
    def backward(ctx, grad_output):
        return (None, *gradients_by_parts(module, ctx.request, grad_output, 2))


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
    request = without_nan(shape.build(torch.float64))
    leaves = [leaf.clone().requires_grad_() for leaf in leaves_of(request)]
    assert torch.autograd.gradcheck(lambda *parts: Parts.apply(request, *parts), leaves)


def test_part_by_part_with_sums_of_its_own_would_be_wrong():
    """Why a part is given the log-sum-exp of the whole."""
    request = RequestShape().build(torch.float64)
    weight = torch.ones_like(request.queries)
    right = gradients_by_parts(module, request, weight, 8)[0]
    alone = gradients_by_parts(module, attrs.evolve(request, segments=()), weight, 8)[0]
    assert not torch.allclose(right, alone)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_under_autocast_too(dtype, autocast):
    request = RequestShape(width=16, segments=(), fillers=()).build(dtype)
    wide = rebuilt(request, [leaf.double() for leaf in leaves_of(request)])
    weight = weight_for(request)
    output, log_sums = merged(wide)
    output = output.to(dtype)
    length, text = request.queries.shape[2], request.keys.shape[2]
    options = {"scale": request.scale, "visible": module.text_visibility(length, text, torch.device("cpu"))}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        delta = module.row_products(weight, output)
        *found, no_bias = module.partial_backward(
            weight, request.queries, request.keys, request.values, delta, log_sums.float(), **options
        )
    assert no_bias is None
    assert all(part.dtype == torch.float32 for part in (delta, *found))
    exact = (weight.double() * output.double()).sum(-1)
    *wanted, _ = module.partial_backward(
        weight.double(), wide.queries, wide.keys, wide.values, exact, log_sums, **options
    )
    check_equal([delta, *found], [exact, *wanted], 1e-5)
