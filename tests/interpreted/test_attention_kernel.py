"""The attention kernel, interpreted."""

from __future__ import annotations

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from mplus.backends.base import Segment
from mplus.backends.reference import ReferenceBackend
from mplus.backends.triton.attention import forward, merge, plain_attention
from mplus.backends.triton.backend import TritonBackend
from mplus.backends.triton.configs import Tiles
from mplus.backends.triton.kernels import attention as kernels
from mplus.testing.attention import exact_attention
from mplus.testing.backends import BackendConformance
from mplus.testing.drawing import RequestShape
from mplus.testing.strategies import CONFORMANCE, request_shapes
from tests.interpreted.checks import ATTENTION_CASES, SMALL, check_attention, widened

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FEWER = settings(CONFORMANCE, max_examples=12)


class TestTritonBackend(BackendConformance):
    """The suite of every backend."""

    implementation = TritonBackend
    dtypes = (torch.float32, torch.float16, torch.bfloat16)

    def make(self):
        return TritonBackend(interpret=True)

    def build(self, shape, dtype=torch.float32, **changes):
        """Fewer heads, which are programs to interpret; the other tests here have more."""
        return super().build(
            attrs.evolve(shape, key_heads=shape.key_heads if shape.batch == 1 else 1), dtype, **changes
        )

    def check_reasons(self, request, *named):
        """A mask is refused as such, whatever else there is about the request."""
        return super().check_reasons(request, *(named if request.mask is None else ()))

    @FEWER
    @given(
        shape=request_shapes(mask="causal", sinks=True),
        softcap=st.sampled_from([None, 2.0]),
        data=st.data(),
    )
    def test_is_right_for_every_shape(self, shape, softcap, data):
        request = self.build(shape, data.draw(st.sampled_from(self.dtypes)), softcap=softcap)
        assert self.make().unsupported_reasons(request) == []
        self.check_output(request)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ATTENTION_CASES)
def test_cases(name, dtype):
    shape, splits = ATTENTION_CASES[name]
    check_attention(kernels, shape.build(dtype), splits=splits)


@FEWER
@given(
    shape=request_shapes(mask="causal"),
    width=st.integers(1, 40),
    value_width=st.integers(1, 40),
    queries=st.integers(1, 24),
    past=st.integers(0, 30),
    long=st.integers(0, 40),
    softcap=st.sampled_from([None, 0.5, 30.0]),
    splits=st.integers(1, 4),
    tiles=st.sampled_from([SMALL, Tiles(32, 16, 4, 1), Tiles(16, 32, 4, 1)]),
    dtype=st.sampled_from(DTYPES),
)
def test_every_shape(shape, width, value_width, queries, past, long, softcap, splits, tiles, dtype):
    """Sizes beyond one tile, odd ones, and splits without any key."""
    shape = attrs.evolve(
        shape,
        width=width,
        value_width=value_width,
        queries=queries,
        past=past,
        softcap=softcap,
        segments=(long, *shape.segments),
        fillers=("some", *shape.fillers),
    )
    check_attention(kernels, shape.build(dtype), splits=splits, tiles=tiles)


@FEWER
@given(shape=request_shapes(mask="causal", sinks=True), softcap=st.sampled_from([None, 2.0]))
def test_gradients_of_every_input(shape, softcap):
    """Sinks too; those at filler rows are zero, not NaN."""
    request = shape.build(softcap=softcap)
    exact = attrs.evolve(widened(request), sinks=request.sinks.double())
    found = gradients(request, lambda r: TritonBackend(interpret=True).attend(r).output)
    expected = gradients(exact, lambda r: ReferenceBackend().attend(r).output)
    for gradient, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient.double(), wanted, atol=1e-4, rtol=1e-4)


def gradients(request, attend):
    """Of a weighted sum of the output towards queries, text, sinks and memory."""
    leaves = [request.queries, request.keys, request.values, request.sinks]
    leaves += [part for segment in request.segments for part in (segment.keys, segment.values)]
    queries, keys, values, sinks, *memory = leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    segments = tuple(Segment(*memory[2 * i : 2 * i + 2], segment.lengths) for i, segment in enumerate(request.segments))
    output = attend(attrs.evolve(request, queries=queries, keys=keys, values=values, sinks=sinks, segments=segments))
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(3)).to(output)
    return torch.autograd.grad((output * weight).sum(), leaves)


@pytest.mark.parametrize("width", [32, 48, 64, 80, 96, 128, 192, 256])
def test_widths_of_heads(width):
    shape = RequestShape(batch=1, queries=3, segments=(5,), width=width, value_width=width)
    check_attention(kernels, shape.build(torch.bfloat16))
    check_attention(kernels, shape.build())


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
def test_padded_text_may_hold_anything(garbage):
    request = RequestShape(batch=2, queries=4, past=18, padding=18, segments=(3,)).build()
    spoilt = [part.clone() for part in (request.keys, request.values)]
    for part in spoilt:
        part[1, :, :18] = garbage
    outputs = [forward(r, tiles=SMALL)[0] for r in (request, attrs.evolve(request, keys=spoilt[0], values=spoilt[1]))]
    assert torch.equal(*outputs)


def test_large_scores_do_not_overflow():
    request = RequestShape(queries=20, segments=(33,)).build()
    check_attention(kernels, attrs.evolve(request, queries=request.queries * 300))


@pytest.mark.parametrize("splits", [1, 2, 5])
def test_the_plan_may_split_keys(splits):
    request = RequestShape(queries=1, past=70, segments=(60,), sinks=True).build()
    output, _ = forward(request, splits=splits, tiles=SMALL)
    torch.testing.assert_close(output.double(), exact_attention(request)[0], atol=2e-6, rtol=0)


def test_what_is_not_adjacent_is_copied():
    request = RequestShape().build()
    turned = attrs.evolve(
        request,
        queries=request.queries.mT.contiguous().mT,
        segments=tuple(Segment(s.keys.mT.contiguous().mT, s.values, s.lengths) for s in request.segments),
    )
    assert torch.equal(forward(turned)[0], forward(request)[0])


def test_the_log_sum_includes_the_sinks():
    request = RequestShape(sinks=True).build()
    expected = torch.logaddexp(plain_attention(request)[1], request.sinks[:, None].expand(-1, 3))
    torch.testing.assert_close(forward(request)[1], expected)


class TestSpecification:
    """What the kernel is compared with is compared with attention one query at a time."""

    @FEWER
    @given(shape=request_shapes(mask="causal"), softcap=st.sampled_from([None, 2.0]))
    def test_is_exact_attention(self, shape, softcap):
        request = shape.build(torch.float64, softcap=softcap)
        torch.testing.assert_close(plain_attention(request)[0], exact_attention(request)[0])

    def test_merging_parts_gives_the_whole(self):
        whole = RequestShape(queries=1, past=0, segments=(4, 6), fillers=("none", "all")).build(torch.float64)
        keys = [part.keys.nan_to_num() for part in whole.segments]
        values = [part.values.nan_to_num() for part in whole.segments]
        parts = [
            plain_attention(attrs.evolve(whole, segments=(), keys=k[:, :, -1:], values=v[:, :, -1:]))
            for k, v in zip([*keys, whole.keys], [*values, whole.values], strict=True)
        ]
        output, sums = merge(torch.stack([o for o, _ in parts]), torch.stack([s for _, s in parts]))
        joined = attrs.evolve(
            whole,
            segments=(),
            keys=torch.cat([k[:, :, -1:] for k in [*keys, whole.keys]], 2),
            values=torch.cat([v[:, :, -1:] for v in [*values, whole.values]], 2),
        )
        expected, expected_sums = plain_attention(joined)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(sums, expected_sums)

    def test_merging_nothing_gives_zeros(self):
        output, sums = merge(torch.zeros(2, 1, 1, 1, 3), torch.full((2, 1, 1, 1), -torch.inf))
        assert not output.any()
        assert bool((sums == -torch.inf).all())

    def test_widened_keeps_the_rest(self):
        request = RequestShape(softcap=2.0, padding=1).build(torch.bfloat16)
        assert widened(request).softcap == 2.0
        assert widened(request).padding is request.padding
