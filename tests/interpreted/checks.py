"""What a kernel must do, as functions of the module that holds it, so that altered copies can be held to it as well."""

from __future__ import annotations

import attrs
import torch

from mplus.backends.base import Segment
from mplus.backends.joined import joined_bias, joined_keys_values, joined_visibility
from mplus.backends.triton.attention import merge, plain_attention
from mplus.backends.triton.configs import Tiles
from mplus.backends.triton.gather import plain_gather_rotated
from mplus.backends.triton.score import plain_sigmoid_means
from mplus.testing.drawing import RequestShape
from tests.interpreted.guards import Output, guarded

FEW_ULPS = 8
SMALL = Tiles(16, 16, 4, 1)
"""The smallest tiles, so that small cases have several."""


def error(actual, exact):
    """Largest absolute error; infinite where only one is infinite, or one is NaN."""
    actual, exact = actual.double(), exact.double()
    difference = (actual - exact).abs().masked_fill(actual == exact, 0).nan_to_num(nan=torch.inf, posinf=torch.inf)
    return float(difference.max()) if difference.numel() else 0.0


def check_close(actual, plain, exact, dtype, *, size=1.0):
    """Raise AssertionError unless the error is at most twice that of plain torch and a few units of the last place."""
    allowed = 2 * error(plain, exact) + FEW_ULPS * torch.finfo(dtype).eps * max(size, 1.0)
    found = error(actual, exact)
    assert found <= allowed, f"error {found}, allowed {allowed}"


# ---------------------------------------------------------------------- attention


def widened(request):
    """The request in float64."""
    return attrs.evolve(
        request,
        queries=request.queries.double(),
        keys=request.keys.double(),
        values=request.values.double(),
        segments=tuple(
            Segment(s.keys.double(), s.values.double(), s.lengths, None if s.bias is None else s.bias.double())
            for s in request.segments
        ),
    )


def attention_in_own_dtype(request):
    """Attention with ordinary operations in the dtype of the request."""
    groups = request.queries.shape[1] // request.keys.shape[1]
    keys, values = (part.repeat_interleave(groups, dim=1) for part in joined_keys_values(request))
    scores = request.queries @ keys.mT * request.scale
    if request.softcap is not None:
        scores = request.softcap * torch.tanh(scores / request.softcap)
    bias = joined_bias(request)
    scores = scores if bias is None else scores + bias
    scores = scores.masked_fill(~joined_visibility(request), -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ values


def check_attention(kernels, request, *, splits=1, tiles=SMALL):
    """Output and log-sum-exp of all splits are those of float64; nothing outside is read or written."""
    segments = tuple(
        Segment(guarded(s.keys), guarded(s.values), s.lengths, s.bias) for s in request.segments if s.keys.shape[2]
    )
    inside = attrs.evolve(
        request,
        queries=guarded(request.queries),
        keys=guarded(request.keys),
        values=guarded(request.values),
        padding=None if request.padding is None else guarded(request.padding),
    )
    shape = request.queries.shape[:3]
    output, sums = Output(splits, *shape, request.values.shape[3]), Output(splits, *shape)
    kernels.launch(inside, segments, output.inside, sums.inside, tiles)
    output.check()
    sums.check()
    found, found_sums = merge(output.inside, sums.inside)
    exact, exact_sums = plain_attention(widened(request))
    largest = max(float(v.nan_to_num().abs().max()) for v in (request.values, *(s.values for s in segments)))
    check_close(found, attention_in_own_dtype(request), exact, request.queries.dtype, size=largest)
    seen = exact_sums != -torch.inf
    size = float(exact_sums[seen].abs().max()) if seen.any() else 1.0
    check_close(found_sums, plain_attention(request)[1], exact_sums, torch.float32, size=size)
    assert not found[~seen].any(), "a query that sees nothing yields zeros"


ATTENTION_CASES = {
    "memory": (RequestShape(queries=5, past=0, segments=(21,), width=20, value_width=18), 1),
    "softcap": (RequestShape(queries=6, softcap=1.5, segments=(7,)), 1),
    "fillers": (RequestShape(batch=3, queries=3, segments=(20, 19), fillers=("some", "all")), 1),
    "shared": (RequestShape(batch=2, queries=3, segments=(9,), shared=True, key_heads=3), 1),
    "padding": (RequestShape(queries=20, past=4, padding=19, segments=(), fillers=()), 1),
    "window": (RequestShape(batch=1, queries=20, past=12, window=5, segments=(3,)), 1),
    "one token": (RequestShape(queries=1, past=35, segments=(18, 3), fillers=("none", "none"), groups=3), 2),
    "four segments": (
        RequestShape(queries=2, segments=(3, 17, 2, 5), fillers=("some", "none", "some", "some"), seed=5),
        3,
    ),
    "causal": (RequestShape(queries=21, past=2, segments=(), fillers=()), 1),
    "bias": (RequestShape(queries=3, segments=(18, 5), fillers=("none", "some"), bias="all", softcap=2.0, seed=2), 2),
    "one bias": (RequestShape(batch=2, queries=2, segments=(3,), bias="one"), 1),
    "window and padding": (RequestShape(queries=19, past=14, padding=17, window=7, segments=(2,)), 2),
}
"""name -> shape and number of splits; small, each with something the others lack, cheap ones first."""


def check_attention_case(kernels, name):
    """One of the cases, in float32."""
    shape, splits = ATTENTION_CASES[name]
    check_attention(kernels, shape.build(), splits=splits)


# ---------------------------------------------------------------------- score


@attrs.define(frozen=True)
class ScoreShape:
    """A small scoring problem."""

    batch: int = 2
    length: int = 21
    count: int = 37
    width: int = 20
    masked: bool = True
    shared: bool = True
    seed: int = 0

    def build(self, dtype=torch.float32):
        generator = torch.Generator().manual_seed(self.seed)
        queries = torch.randn(self.batch, self.length, self.width, generator=generator).to(dtype)
        keys = torch.randn(1 if self.shared else self.batch, self.count, self.width, generator=generator).to(dtype)
        if not self.masked:
            return queries, None, keys
        mask = torch.rand(self.batch, self.length, generator=generator) > 0.4
        mask[-1] &= self.batch == 1  # a text without any token
        return queries.masked_fill(~mask[..., None], torch.nan), mask, keys


SCORE_CASES = {
    "plain": ScoreShape(masked=False),
    "masked": ScoreShape(),
    "per text": ScoreShape(shared=False, batch=3, length=5, count=18, width=3),
    "one token": ScoreShape(length=1, batch=1, masked=False),
    "whole tiles": ScoreShape(length=32, count=32, width=16, masked=False),
}


def check_score(kernels, shape, dtype=torch.float32, tiles=SMALL):
    """Scores are those of float64, of the tokens of the text alone; nothing outside is read or written."""
    queries, mask, keys = shape.build(dtype)
    scores = Output(shape.batch, shape.count)
    kernels.launch(guarded(queries), None if mask is None else guarded(mask), guarded(keys), scores.inside, tiles)
    scores.check()
    exact = plain_sigmoid_means(queries.double(), mask, keys.double())
    check_close(scores.inside, plain_sigmoid_means(queries, mask, keys), exact, torch.float32)


def check_score_case(kernels, name):
    """One of the cases, in float32."""
    check_score(kernels, SCORE_CASES[name])


# ---------------------------------------------------------------------- gather


@attrs.define(frozen=True)
class GatherShape:
    """A small gather."""

    stored: int = 40
    count: int = 21
    heads: int = 3
    width: int = 20
    value_width: int = 18
    rotated: int = 12
    seed: int = 0

    def build(self, dtype=torch.float32):
        generator = torch.Generator().manual_seed(self.seed)
        rows = torch.randn(self.stored, self.heads * (self.width + self.value_width), generator=generator).to(dtype)
        indices = torch.randint(self.stored, (self.count,), generator=generator)
        # Not the same in both halves, although rotations of decoders are: so each half must be read in its place.
        angles = 6 * torch.rand(self.count, self.rotated, generator=generator)
        return rows, indices, angles.cos(), angles.sin()


GATHER_CASES = {
    "partly rotated": GatherShape(),
    "all rotated": GatherShape(width=16, value_width=16, rotated=16, heads=1),
    "not rotated": GatherShape(rotated=0, width=3, value_width=5),
    "one row": GatherShape(count=1, width=2, rotated=2),
}


def check_gather(kernels, shape, dtype=torch.float32, tiles=SMALL):
    """Keys and values are those of float64, rounded once; nothing outside is read or written."""
    inputs = shape.build(dtype)
    keys = Output(shape.heads, shape.count, shape.width, dtype=dtype)
    values = Output(shape.heads, shape.count, shape.value_width, dtype=dtype)
    kernels.launch(*(guarded(part) for part in inputs), keys.inside, values.inside, tiles)
    keys.check()
    values.check()
    rows, indices, cos, sin = inputs
    exact = [torch.empty(part.inside.shape, dtype=torch.float64) for part in (keys, values)]
    plain = [torch.empty(part.inside.shape, dtype=dtype) for part in (keys, values)]
    plain_gather_rotated(rows.double(), indices, cos.double(), sin.double(), *exact)
    plain_gather_rotated(rows, indices, cos, sin, *plain)
    check_close(keys.inside, plain[0], exact[0], torch.float32, size=float(exact[0].abs().max()))
    assert error(values.inside, plain[1]) == 0, "values are copied, so there is no error to allow"


def check_gather_case(kernels, name):
    """One of the cases, in float32."""
    check_gather(kernels, GATHER_CASES[name])
