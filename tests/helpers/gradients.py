"""What gradients of attention must be, as functions of the module that computes them, so that altered copies can be
held to it as well."""

from __future__ import annotations

from unittest import mock

import attrs
import torch

from mplus.backends import merge
from mplus.backends.base import Segment
from mplus.backends.reference import ReferenceBackend
from mplus.backends.triton.attention import plain_attention
from mplus.testing.drawing import RequestShape


def leaves_of(request):
    """Queries, text, memory (keys, values and bias), sinks."""
    parts = [part for segment in request.segments for part in (segment.keys, segment.values, segment.bias)]
    segments = [part for part in parts if part is not None]
    sinks = [] if request.sinks is None else [request.sinks]
    return [request.queries, request.keys, request.values, *segments, *sinks]


def rebuilt(request, leaves):
    """The request with other tensors, in the order of ``leaves_of``."""
    queries, keys, values, *rest = leaves
    left = iter(rest)
    segments = tuple(
        Segment(next(left), next(left), segment.lengths, None if segment.bias is None else next(left))
        for segment in request.segments
    )
    sinks = next(left) if request.sinks is not None else None
    return attrs.evolve(request, queries=queries, keys=keys, values=values, sinks=sinks, segments=segments)


def without_nan(request):
    """The request with zeros in its filler rows, which differences of neighbours can be taken of."""
    segments = tuple(
        Segment(s.keys.nan_to_num(), s.values.nan_to_num(), s.lengths, None if s.bias is None else s.bias.nan_to_num())
        for s in request.segments
    )
    return attrs.evolve(request, segments=segments)


def weight_for(request):
    """What the output is multiplied with before it is summed: its gradient. Its tokens do not lie side by side."""
    batch, heads, length, _ = request.queries.shape
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(batch, length, heads, request.values.shape[-1], generator=generator, dtype=torch.float64)
    return drawn.to(request.queries.dtype).transpose(1, 2)


def gradients_of(backend, request):
    """Towards ``leaves_of(request)``, by autograd."""
    leaves = [leaf.clone().requires_grad_() for leaf in leaves_of(request)]
    output = backend.attend(rebuilt(request, leaves)).output
    return torch.autograd.grad(output, leaves, weight_for(request), materialize_grads=True)


def check_equal(found, wanted, tolerance):
    """Raise AssertionError unless all gradients are as wanted; NaN never is."""
    for actual, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(actual.double(), expected.double(), atol=tolerance, rtol=tolerance)


# ---------------------------------------------------------------------- part by part


def merged(request):
    """Output and log-sum-exp of the whole attention, sinks included."""
    output, log_sums = plain_attention(request)
    if request.sinks is not None:
        column = request.sinks[:, None].expand_as(log_sums)
        output = output * torch.sigmoid(log_sums - column)[..., None]
        log_sums = torch.logaddexp(log_sums, column)
    return output, log_sums


def gradients_by_parts(module, request, grad_output, chunk, autocast=False):
    """By functions of ``module``, which is ``mplus.backends.partial_backward`` or a copy of it.

    With ``autocast``, parts are computed where products of float32 would be taken to half precision.
    """
    output, log_sums = merged(request)
    delta = module.row_products(grad_output, output)
    length, text = request.queries.shape[2], request.keys.shape[2]
    visible = module.text_visibility(length, text, torch.device("cpu"), window=request.window, padding=request.padding)
    if request.mask is not None:
        visible = lambda start, stop: request.mask[..., start:stop]  # noqa: E731
    parts = [(request.keys, request.values, None, visible)]
    parts += [(s.keys, s.values, s.bias, module.memory_visibility(s.lengths)) for s in request.segments]
    towards_queries, towards_rows = 0, []
    for keys, values, bias, seen in parts:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            part, *rows = module.partial_backward(
                grad_output,
                request.queries,
                keys,
                values,
                delta,
                log_sums,
                scale=request.scale,
                softcap=request.softcap,
                visible=seen,
                bias=bias,
                chunk=chunk,
            )
        towards_queries += part
        towards_rows += [row for row in rows if row is not None]
    sinks = [] if request.sinks is None else [module.sink_gradient(request.sinks, delta, log_sums)]
    return [towards_queries, *towards_rows, *sinks]


@attrs.define(frozen=True)
class Case:
    """A request, and how its gradients are computed."""

    shape: RequestShape
    chunk: int = 2
    dtype: torch.dtype = torch.float64
    autocast: bool = False


PART_CASES = {
    "plain": Case(RequestShape(batch=1), chunk=1024),
    "chunks": Case(RequestShape(batch=1, segments=(5, 4), fillers=("none", "none"))),
    "fillers": Case(RequestShape(segments=(3, 0, 5), fillers=("some", "none", "all"), seed=4)),
    "window": Case(RequestShape(queries=5, past=4, window=3, segments=(2,), fillers=("none",))),
    "padding": Case(RequestShape(batch=3, queries=4, padding=4, segments=(), fillers=())),
    "shared": Case(RequestShape(shared=True, batch=3, segments=(4,), fillers=("none",))),
    "softcap": Case(RequestShape(softcap=0.7)),
    "sinks": Case(RequestShape(sinks=True)),
    "bias": Case(RequestShape(segments=(3, 5), fillers=("some", "none"), bias="all", softcap=0.7, seed=3)),
    "one bias": Case(RequestShape(segments=(4,), bias="one")),
    "mask per head": Case(RequestShape(mask="bool", per_head=True, segments=(), fillers=(), key_heads=2, groups=2)),
    "autocast": Case(RequestShape(), dtype=torch.float32, autocast=True),
}
"""name -> case; small, each with something the others lack."""
PRECISION = {torch.float64: 1e-11, torch.float32: 1e-5}


def check_parts(module, name):
    """Gradients part by part are those of the whole attention."""
    case = PART_CASES[name]
    request = case.shape.build(case.dtype)
    found = gradients_by_parts(module, request, weight_for(request), case.chunk, case.autocast)
    check_equal(found, gradients_of(ReferenceBackend(), request), PRECISION[case.dtype])


# ---------------------------------------------------------------------- merged

_LONGER = {"past": 0, "segments": (3, 4), "sinks": True, "seed": 5}
MERGE_CASES = {
    f"{'shared' if shared else 'own'} memory, {fillers} fillers, {mask} text": RequestShape(
        fillers=("none", fillers), shared=shared, mask=mask, **_LONGER
    )
    for shared in (False, True)
    for fillers in ("none", "some")
    for mask in ("causal", "padded", "additive")
}
MERGE_CASES |= {
    f"bias of {bias}, {'shared' if shared else 'own'} memory": RequestShape(
        fillers=("none", "some"), shared=shared, bias=bias, **_LONGER
    )
    for shared in (False, True)
    for bias in ("one", "rows", "all")
}
"""name -> shape."""


def check_merge(module, name):
    """Gradients of ``module.MergeBackend`` are those of the reference to the precision of float64."""
    request = without_nan(MERGE_CASES[name].build(torch.float64))
    biases = {id(segment.bias) for segment in request.segments}  # the backend gives these no gradient
    kept = [place for place, leaf in enumerate(leaves_of(request)) if id(leaf) not in biases]
    found, wanted = (gradients_of(backend, request) for backend in (module.MergeBackend(), ReferenceBackend()))
    check_equal([found[place] for place in kept], [wanted[place] for place in kept], 1e-12)


def check_merge_of(parts, name):
    """As ``check_merge``, with ``parts`` in the place of ``mplus.backends.parts``."""
    with mock.patch.object(merge, "parts_of", parts.parts_of):
        check_merge(merge, name)
