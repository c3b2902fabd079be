"""Malformed attention requests are refused before any kernel sees them."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch

from mplus.backends.base import Segment
from mplus.backends.checks import check_finite, check_request
from mplus.backends.choose import choose
from mplus.errors import InputError
from mplus.testing.drawing import RequestShape

REQUEST = RequestShape(batch=2, groups=2, key_heads=2, queries=3, past=2, width=4, segments=(5,)).build()
SEGMENT = REQUEST.segments[0]


def ones(*shape: int, **options: Any) -> torch.Tensor:
    return torch.ones(*shape, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries": ones(2, 3, 4)}, r"queries must be \[batch, heads, tokens, width\], got \[2, 3, 4\]"),
        ({"queries": ones(2, 3, 3, 4)}, "a multiple of the 2 heads of the keys, got 3"),
        ({"queries": ones(2, 4, 0, 4)}, r"queries must have at least one token, got \[2, 4, 0, 4\]"),
        ({"keys": ones(2, 2, 2, 4), "values": ones(2, 2, 2, 4)}, r"as many text tokens as queries \(3\), got 2"),
        ({"keys": ones(2, 2, 0, 4), "values": ones(2, 2, 0, 4)}, r"as many text tokens as queries \(3\), got 0"),
        ({"keys": ones(1, 2, 5, 4)}, r"keys must be \[2, 2, 5, 4\], got \[1, 2, 5, 4\]"),
        ({"values": ones(2, 2, 4, 4)}, r"values must be \[2, 2, 5\] and a width"),
        ({"queries": ones(2, 4, 3, 4, dtype=torch.int64)}, "queries must be floating point, got torch.int64"),
        ({"queries": ones(2, 4, 3, 4, device="meta")}, r"keys must be on the device of the queries \(meta\), got cpu"),
        ({"mask": ones(3, 4, dtype=torch.bool)}, r"mask must broadcast to \[2, 4, 3, 5\], got \[3, 4\]"),
        ({"mask": ones(3, 5, dtype=torch.int64)}, "mask must be bool or floating point, got torch.int64"),
        ({"padding": torch.tensor([1])}, r"padding must be \[2\] int64, got \[1\]"),
        ({"padding": ones(2)}, r"padding must be \[2\] int64, got \[2\] torch.float32"),
        ({"sinks": ones(2)}, r"sinks must be \[4\], one per head of the queries, got \[2\]"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"softcap": 0.0}, r"softcap must be above 0, got 0\.0"),
        ({"dropout": 1.0}, r"dropout must be at least 0 and below 1, got 1\.0"),
    ],
)
def test_a_malformed_request_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        choose("auto", attrs.evolve(REQUEST, **changes))


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        (Segment(ones(2, 3, 5, 4), ones(2, 3, 5, 4)), r"segments\[0\]\.keys must be \[1 or 2, 2, rows, 4\]"),
        (Segment(ones(3, 2, 5, 4), ones(3, 2, 5, 4)), r"segments\[0\]\.keys must be \[1 or 2, 2, rows, 4\]"),
        (Segment(ones(2, 2, 5, 3), ones(2, 2, 5, 4)), r"segments\[0\]\.keys must be \[1 or 2, 2, rows, 4\]"),
        (Segment(SEGMENT.keys, ones(2, 2, 6, 4)), r"segments\[0\]\.values must be \[2, 2, 5, 4\], got \[2, 2, 6, 4\]"),
        (Segment(SEGMENT.keys, ones(1, 2, 5, 4)), r"segments\[0\]\.values must be \[2, 2, 5, 4\], got \[1, 2, 5, 4\]"),
        (Segment(SEGMENT.keys.to("meta"), SEGMENT.values), r"segments\[0\]\.keys must be on the device .* got meta"),
        (Segment(SEGMENT.keys, SEGMENT.values, torch.tensor([1])), r"segments\[0\]\.lengths must be \[2\] int64"),
        (Segment(SEGMENT.keys, SEGMENT.values, ones(2)), r"lengths must be \[2\] int64, got \[2\] torch.float32"),
        (attrs.evolve(SEGMENT, bias=ones(5)), r"segments\[0\]\.bias must be \[1 or 2, 1 or 2, 5\], got \[5\]"),
        (attrs.evolve(SEGMENT, bias=ones(2, 4, 5)), r"bias must be \[1 or 2, 1 or 2, 5\], got \[2, 4, 5\]"),
        (attrs.evolve(SEGMENT, bias=ones(2, 2, 1)), r"bias must be \[1 or 2, 1 or 2, 5\], got \[2, 2, 1\]"),
        (attrs.evolve(SEGMENT, bias=ones(1, 1, 5).long()), r"bias must be floating point, got torch\.int64"),
        (attrs.evolve(SEGMENT, bias=ones(1, 1, 5).to("meta")), r"bias must be on the device .* got meta"),
        (attrs.evolve(SEGMENT, bias=-torch.inf * ones(1, 1, 5)), r"bias must be finite, got NaN or Inf in 5 of 5"),
    ],
)
def test_a_malformed_segment_is_refused(segment: Segment, message: str) -> None:
    with pytest.raises(InputError, match=message):
        choose("auto", attrs.evolve(REQUEST, segments=(segment,)))


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite_are_counted(wrong: float) -> None:
    rows = torch.tensor([1.0, wrong, -wrong, 2.0])
    check_finite("memory", rows[:1], rows[3:], rows[:0])
    with pytest.raises(InputError, match="memory must be finite, got NaN or Inf in 2 of 4 numbers"):
        check_finite("memory", rows[:1], rows)


def test_large_numbers_are_finite() -> None:
    for dtype in (torch.float16, torch.float32):
        check_finite("memory", torch.full((1000,), torch.finfo(dtype).max, dtype=dtype))


def test_a_well_formed_request_passes() -> None:
    for mask in ("causal", "bool", "additive", "padded"):
        for shared in (False, True):
            shape = RequestShape(mask=mask, shared=shared, segments=(0, 3), fillers=("none", "some"), sinks=True)
            check_request(shape.build(softcap=2.0, window=2, padding=torch.tensor([0, 1])))


def test_a_bias_at_fillers_may_be_anything() -> None:
    bias = ones(2, 1, 5)
    bias[1, :, 3:] = torch.nan
    segment = attrs.evolve(SEGMENT, lengths=torch.tensor([5, 3]), bias=bias)
    assert choose("auto", attrs.evolve(REQUEST, segments=(segment,))).name == "merge"
