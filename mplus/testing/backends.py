"""What every ``AttentionBackend`` must do."""

from __future__ import annotations

from typing import Any, ClassVar

import attrs
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from mplus.backends.base import AttentionBackend, AttentionRequest, Segment
from mplus.backends.checks import tensors_of
from mplus.testing import rounding
from mplus.testing.attention import exact_attention, plain_attention
from mplus.testing.drawing import RequestShape
from mplus.testing.requests import (
    batch_row,
    gradients_of,
    nudged,
    with_fillers,
    with_learned_bias,
)
from mplus.testing.strategies import CONFORMANCE, request_shapes

TINY = 8
"""Units in the last place, of the largest value, that an error may have beyond twice that of plain torch."""


class BackendConformance:
    """Subclass it in a test module and set ``implementation``, or override ``make``.

    A backend may refuse what it cannot honour, with reasons; what it accepts has to be right. It must accept the
    plain case: causal text, one dtype, any memory.

    Attributes:
        implementation: the backend class under test.
        dtypes: dtypes that must be accepted.
        device: where requests are made.
    """

    implementation: ClassVar[type[AttentionBackend]]
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32, torch.bfloat16)
    device: ClassVar[str] = "cpu"

    def make(self) -> AttentionBackend:
        """Return a new backend."""
        backend = self.implementation()
        assert isinstance(backend, AttentionBackend)
        return backend

    # ------------------------------------------------------------------ comparing

    def build(self, shape: RequestShape, dtype: torch.dtype = torch.float32, **changes: Any) -> AttentionRequest:
        """Return the request on this suite's device."""
        return shape.build(dtype, self.device, **changes)

    def check_reasons(self, request: AttentionRequest, *named: str) -> list[str]:
        """Return the backend's reasons; raise AssertionError unless they are texts, one with every word of ``named``.

        Where values have another width than keys, a backend may refuse for that alone.
        """
        reasons = self.make().unsupported_reasons(request)
        assert isinstance(reasons, list)
        assert all(isinstance(reason, str) and reason.strip() for reason in reasons)
        uneven = request.values.shape[-1] != request.queries.shape[-1]
        # The request without anything that it could do without: what is refused even then is the width.
        simple = attrs.evolve(request, mask=None, softcap=None, sinks=None, dropout=0.0, need_weights=False)
        if reasons and named and not (uneven and self.make().unsupported_reasons(simple) == reasons):
            assert any(all(word in reason for word in named) for reason in reasons), (
                f"no reason names {named}: {reasons}"
            )
        return reasons

    def check_output(self, request: AttentionRequest) -> None:
        """Raise AssertionError unless the output is exact but for at most twice the error of plain torch."""
        result = self.make().attend(request)
        exact, weights = exact_attention(request)
        dtype = request.queries.dtype
        assert result.output.shape == (*request.queries.shape[:3], request.values.shape[-1])
        assert result.output.dtype == dtype
        assert result.output.device == request.queries.device
        assert _error(result.output, exact) <= _allowed(request, exact)
        blind = weights.sum(-1) == 0
        assert not result.output.cpu()[blind].any(), "a query that sees nothing yields zeros"
        if request.need_weights:
            assert result.weights is not None
            assert result.weights.shape == weights.shape
            assert _error(result.weights, weights) <= 4 * torch.finfo(dtype).eps + 1e-6
        else:
            assert result.weights is None

    def check(self, request: AttentionRequest, *named: str) -> None:
        """Right where the request is accepted, reasons that name the matter where it is not."""
        if not self.check_reasons(request, *named):
            self.check_output(request)

    # ------------------------------------------------------------------ the tests

    def test_has_a_name(self) -> None:
        assert isinstance(self.implementation.name, str)
        assert self.implementation.name

    @pytest.mark.parametrize("queries", [1, 4])
    @pytest.mark.parametrize("segments", [(), (0,), (5,), (3, 0, 4)], ids=str)
    @pytest.mark.parametrize("fillers", ["none", "some"])
    def test_accepts_the_plain_case(self, queries: int, segments: tuple[int, ...], fillers: str) -> None:
        shape = RequestShape(queries=queries, segments=segments, fillers=(fillers,) * len(segments))
        for dtype in self.dtypes:
            request = self.build(shape, dtype)
            assert self.make().unsupported_reasons(request) == []
            self.check_output(request)

    @CONFORMANCE
    @given(shape=request_shapes(), data=st.data())
    def test_is_right_for_every_shape_and_mask(self, shape: RequestShape, data: st.DataObject) -> None:
        """Odd sizes, single queries, empty segments, groups, every kind of mask; NaN in every filler row."""
        self.check(self.build(shape, data.draw(st.sampled_from(self.dtypes))))

    @CONFORMANCE
    @given(shape=request_shapes(), softcap=st.sampled_from([0.5, 3.0, 50.0]))
    def test_soft_cap(self, shape: RequestShape, softcap: float) -> None:
        """Scores are capped before the mask is applied."""
        self.check(self.build(shape, softcap=softcap), "softcap", str(softcap))

    @CONFORMANCE
    @given(shape=request_shapes(sinks=True))
    def test_sinks(self, shape: RequestShape) -> None:
        """They take part in the softmax, also where nothing is visible."""
        self.check(self.build(shape), "sinks")

    @CONFORMANCE
    @given(shape=request_shapes(sinks=True, softcap=2.0))
    def test_everything_at_once(self, shape: RequestShape) -> None:
        self.check(self.build(shape, need_weights=True))

    @CONFORMANCE
    @given(shape=request_shapes())
    def test_weights(self, shape: RequestShape) -> None:
        """Returned where asked for, zero at what is not visible."""
        self.check(self.build(shape, need_weights=True), "need_weights")

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_every_dtype(self, dtype: torch.dtype) -> None:
        for mask in ("causal", "smallest", "padded"):
            self.check(self.build(RequestShape(mask=mask, fillers=("some",)), dtype), str(dtype))

    def test_mixed_dtypes(self) -> None:
        request = self.build(RequestShape())
        low = tuple(
            attrs.evolve(part, keys=part.keys.bfloat16(), values=part.values.bfloat16()) for part in request.segments
        )
        self.check(attrs.evolve(request, segments=low), "bfloat16")

    @pytest.mark.parametrize("mask", ["bool", "additive", "smallest"])
    @pytest.mark.parametrize("dims", ["TS", "1TS", "B1TS", "11TS", "B11S", "1HTS"])
    def test_masks_of_every_shape_that_broadcasts(self, mask: str, dims: str) -> None:
        request = self.build(RequestShape(batch=2, mask=mask, per_head=True, fillers=("some",)))
        assert request.mask is not None
        part = request.mask
        if dims[-4:-3] in ("1", ""):
            part = part[:1]
        if dims[-3:-2] in ("1", ""):
            part = part[:, :1]
        if dims[-2] == "1":
            part = part[:, :, -1:]
        part = part[(0,) * (4 - len(dims))]
        self.check(attrs.evolve(request, mask=part), "mask")

    @pytest.mark.parametrize("fillers", ["none", "some", "all"])
    @pytest.mark.parametrize("queries", [1, 5])
    @pytest.mark.parametrize("kind", ["bool", "additive", "smallest"])
    def test_queries_whose_text_is_masked_entirely(self, kind: str, queries: int, fillers: str) -> None:
        """They see the memory, as at left padding; where there is none either, zeros come out."""
        for count in (0, 4):
            shape = RequestShape(queries=queries, segments=(count,), fillers=(fillers,), mask="padded")
            for dtype in self.dtypes:
                request = self.build(shape, dtype)
                assert request.mask is not None
                if kind != "bool":
                    masked = -torch.inf if kind == "additive" else torch.finfo(dtype).min
                    zeros = torch.zeros(request.mask.shape, dtype=dtype, device=self.device)
                    request = attrs.evolve(request, mask=zeros.masked_fill(~request.mask, masked))
                self.check(request, "mask")

    def test_a_mask_of_a_narrower_dtype_widened(self) -> None:
        """The smallest bfloat16 is not the smallest float32, and a bias on top of it makes no difference."""
        request = self.build(RequestShape(mask="padded", segments=(), fillers=()))
        assert request.mask is not None
        bias = torch.randn(request.mask.shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        smallest = torch.finfo(torch.bfloat16).min
        self.check(
            attrs.evolve(request, mask=bias + torch.zeros_like(bias).masked_fill(~request.mask, smallest)), "mask"
        )

    @CONFORMANCE
    @given(shape=request_shapes(), garbage=st.sampled_from([torch.nan, torch.inf, -torch.inf, 1e30]))
    def test_filler_rows_do_not_matter(self, shape: RequestShape, garbage: float) -> None:
        """Whatever they hold, the output is the same to the last bit."""
        assume(not shape.shared)
        request = self.build(shape)
        if self.check_reasons(request):
            return
        outputs = [
            self.make().attend(attrs.evolve(request, segments=with_fillers(request, value))).output
            for value in (0.0, garbage)
        ]
        assert torch.equal(*outputs)

    @CONFORMANCE
    @given(shape=request_shapes(), row=st.integers(0, 2))
    def test_a_batch_row_is_as_alone(self, shape: RequestShape, row: int) -> None:
        assume(row < shape.batch)
        request = self.build(shape)
        alone = batch_row(request, row)
        if self.check_reasons(request) or self.check_reasons(alone):
            return
        self.check_output(alone)
        exact = exact_attention(alone)[0]
        assert _error(self.make().attend(request).output[row : row + 1], exact) <= _allowed(alone, exact)

    @CONFORMANCE
    @given(shape=request_shapes())
    def test_gradients(self, shape: RequestShape) -> None:
        """Towards queries, text and memory: those of exact attention; zero, not NaN, at filler rows."""
        self.check_gradients(self.build(shape))

    def check_gradients(self, request: AttentionRequest) -> None:
        """Raise AssertionError unless gradients are those of exact attention, where the backend accepts to give any.

        They may be off by several times what rounding the inputs, or the arithmetic of plain torch, makes of them.
        """
        learning = attrs.evolve(request, queries=request.queries.clone().requires_grad_())
        if self.check_reasons(learning):
            return
        also = () if self.check_reasons(with_learned_bias(request)) else ("bias",)

        def exactly(request: AttentionRequest) -> Tensor:
            return exact_attention(request)[0]

        actual, expected = (gradients_of(request, attend, *also) for attend in (self._attend, exactly))
        others = [
            gradients_of(nudged(request), exactly, *also),
            gradients_of(request, plain_attention, *also),
        ]
        for name, gradient in actual.items():
            wanted = expected[name].double()
            scale = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
            few = TINY * torch.finfo(gradient.dtype).eps * scale
            worst = max(_error(other[name], wanted.cpu()) for other in others)
            assert _error(gradient, wanted) <= rounding.FACTOR * worst + few, name

    @CONFORMANCE
    @given(
        shape=request_shapes(sinks=False),
        bias=st.sampled_from(["one", "rows", "heads", "all"]),
        softcap=st.sampled_from([None, 2.0]),
        data=st.data(),
    )
    def test_bias_of_keys(self, shape: RequestShape, bias: str, softcap: float | None, data: st.DataObject) -> None:
        """Added to the scores of memory behind the soft cap; NaN at fillers does not matter."""
        shape = attrs.evolve(shape, bias=bias)
        request = self.build(shape, data.draw(st.sampled_from(self.dtypes)), softcap=softcap)
        if any(segment.bias is not None for segment in request.segments) and not self.make().supports_key_bias:
            return
        self.check(request)
        if softcap is None:
            self.check_gradients(self.build(shape))

    def test_a_key_with_the_bias_log_2_counts_as_two(self) -> None:
        request = self.build(RequestShape(segments=(3,)), torch.float32)
        if not self.make().supports_key_bias:
            return
        (memory,) = request.segments
        first = [0, 0, 1, 2]
        twice = Segment(memory.keys[:, :, first], memory.values[:, :, first])
        weight = torch.tensor([2.0, 1.0, 1.0], device=self.device).log()[None, None]
        weighted = attrs.evolve(request, segments=(attrs.evolve(memory, bias=weight),))
        expected = exact_attention(attrs.evolve(request, segments=(twice,)))[0]
        self.check_reasons(weighted)
        assert _error(self.make().attend(weighted).output, expected) <= _allowed(weighted, expected)

    def _attend(self, request: AttentionRequest) -> Tensor:
        return self.make().attend(request).output

    @pytest.mark.parametrize("fillers", ["none", "some"])
    def test_dropout(self, fillers: str) -> None:
        """Weights are dropped and the others scaled up, so that the mean stays; none is dropped at probability 0."""
        shape = RequestShape(batch=8, queries=16, past=16, segments=(32,), fillers=(fillers,), width=4)
        request = self.build(shape, dropout=0.25)
        request = attrs.evolve(
            request,
            values=torch.ones_like(request.values),
            segments=tuple(attrs.evolve(s, values=torch.ones_like(s.values)) for s in request.segments),
        )
        if self.check_reasons(request, "dropout", "0.25"):
            return
        with torch.random.fork_rng():
            torch.manual_seed(0)
            sums = self.make().attend(request).output[..., 0]
        assert float(sums.std()) > 0.01, "nothing was dropped"
        assert abs(float(sums.mean()) - 1) < 6 * float(sums.std()) / sums.numel() ** 0.5

    def test_equal_requests_give_equal_results_and_stay_as_they_are(self) -> None:
        shape = RequestShape(segments=(4, 3), fillers=("some", "none"), mask="bool")
        request, same = self.build(shape), self.build(shape)
        if self.check_reasons(request):
            return
        backend = self.make()
        first, second = backend.attend(request), backend.attend(request)
        assert torch.equal(first.output, second.output)
        for name, tensor in tensors_of(request).items():
            assert torch.equal(tensor.nan_to_num(), tensors_of(same)[name].nan_to_num()), f"{name} was changed"


def _error(actual: Tensor, exact: Tensor) -> float:
    """Return the largest absolute error; infinite where there is NaN."""
    difference = (actual.double().cpu() - exact).abs().nan_to_num(nan=torch.inf)
    return float(difference.max()) if difference.numel() else 0.0


def _allowed(request: AttentionRequest, exact: Tensor) -> float:
    """Return twice the error of plain torch, and a few units in the last place of the largest value."""
    eps = torch.finfo(request.queries.dtype).eps
    values = [request.values, *(segment.values for segment in request.segments)]
    largest = max(float(part.nan_to_num().abs().max()) for part in values if part.numel())
    return 2 * _error(plain_attention(request), exact) + TINY * eps * max(largest, 1)
