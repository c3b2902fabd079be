"""Hypothesis strategies for what the interfaces of mplus take: sizes, layouts, rows, attention requests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from mplus.rows import MemoryRows
from mplus.stores.base import StoreLayout
from mplus.testing.drawing import RequestShape, draw_rows

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

CONFORMANCE = settings(
    deadline=None,
    derandomize=True,
    max_examples=40,
    # One suite runs for many implementations: the same inherited test under several classes is meant.
    suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow],
)
"""Settings of every property in the conformance suites: the same examples on every run."""


def sizes(largest: int = 9, smallest: int = 0) -> SearchStrategy[int]:
    """Small sizes, odd ones and the smallest one included."""
    return st.integers(smallest, largest)


def layouts(
    *, key_size: int | None = None, expiry: bool | None = None, dtype: torch.dtype = torch.float32
) -> SearchStrategy[StoreLayout]:
    """Store layouts of 1 to 3 layers, of rows with hidden states, projections or both.

    ``key_size`` and ``expiry`` vary where they are not given.
    """
    return st.builds(
        StoreLayout,
        layers=sizes(3, 1),
        hidden_size=sizes(5, 1),
        key_size=sizes(4) if key_size is None else st.just(key_size),
        expiry=st.booleans() if expiry is None else st.just(expiry),
        dtype=st.just(dtype),
        projected_size=st.sampled_from([0, 0, 2, 3]),
        keeps_hidden=st.booleans(),
    ).filter(lambda layout: layout.keeps_hidden or layout.projected_size > 0)


def rows(layout: StoreLayout, counts: SearchStrategy[int] | None = None) -> SearchStrategy[MemoryRows]:
    """Rows of ``layout``; they shrink towards few rows."""
    counts = sizes() if counts is None else counts
    return st.builds(draw_rows, st.just(layout), counts, st.integers(0, 2**16))


@st.composite
def request_shapes(draw: st.DrawFn, /, **fixed: Any) -> RequestShape:
    """Shapes of attention requests, single queries and empty segments included; ``fixed`` fields do not vary."""
    segments = tuple(draw(st.lists(sizes(7), max_size=3)))
    kinds = st.sampled_from(["none", "some", "all"])
    drawn: dict[str, Any] = {
        "batch": draw(sizes(3, 1)),
        "groups": draw(sizes(3, 1)),
        "key_heads": draw(sizes(3, 1)),
        "queries": draw(sizes(6, 1)),
        "past": draw(sizes(5)),
        "width": draw(st.sampled_from([1, 3, 4, 8])),
        "value_width": draw(st.sampled_from([1, 3, 4, 8])),
        "segments": segments,
        "fillers": tuple(draw(kinds) for _ in segments),
        "shared": draw(st.booleans()),
        "mask": draw(st.sampled_from(["causal", "bool", "additive", "smallest", "padded"])),
        "per_head": draw(st.booleans()),
        "sinks": False,
        "softcap": None,
        "window": draw(st.sampled_from([None, None, 1, 3])),
        "padding": draw(st.sampled_from([0, 0, 1, 2])),
        "seed": draw(st.integers(0, 2**16)),
    }
    return RequestShape(**{**drawn, **fixed})
