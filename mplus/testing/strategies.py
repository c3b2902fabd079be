"""Hypothesis strategies for what the interfaces of mplus take: sizes, layouts, rows, attention requests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from attrs import define, evolve
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from mplus.backends.base import AttentionRequest, Segment
from mplus.rows import NO_SOURCE, MemoryRows
from mplus.stores.base import StoreLayout

if TYPE_CHECKING:
    from collections.abc import Callable

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


def draw_rows(layout: StoreLayout, count: int, seed: int) -> MemoryRows:
    """``count`` random rows of ``layout`` that depend on ``seed`` only; births are neither sorted nor unique."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device=layout.device, dtype=dtype)

    def whole(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (count,), generator=generator).to(layout.device)

    rows = MemoryRows(
        hidden=normal(count, layout.hidden_size, dtype=layout.dtype) if layout.keeps_hidden else None,
        birth=whole(0, 2 * count + 1),
        source=whole(NO_SOURCE, 4),
        key=normal(count, layout.key_size, dtype=layout.dtype) if layout.key_size else None,
        expiry=whole(0, 20).double() if layout.expiry else None,
        projected=normal(count, layout.projected_size, dtype=layout.dtype) if layout.projected_size else None,
    )
    extra = {name: normal(count, *shape, dtype=torch.float64).mul(9).to(dtype) for name, shape, dtype in layout.extra}
    return rows.replace(extra=extra) if extra else rows  # type: ignore[arg-type]


def rows(layout: StoreLayout, counts: SearchStrategy[int] | None = None) -> SearchStrategy[MemoryRows]:
    """Rows of ``layout``; they shrink towards few rows."""
    counts = sizes() if counts is None else counts
    return st.builds(draw_rows, st.just(layout), counts, st.integers(0, 2**16))


@define(frozen=True, kw_only=True)
class RequestShape:
    """Sizes and features of an attention request; ``build`` makes one from them.

    Attributes:
        batch, groups, key_heads, queries, past, width, value_width: B, H / Hkv, Hkv, T, S - T, D, Dv.
        segments: P of each segment.
        fillers: per segment "none", "some" (rows behind the real ones, which hold NaN) or "all".
        shared: memory has batch 1.
        bias: that memory has for each key: "none", "one" for the whole batch and all heads, "rows" (another for each
            batch row), "heads" (for each head of the keys) or "all" (both); with rows, NaN at fillers.
        mask: "causal" (None), "bool", "additive" (with -inf), "smallest" (with the smallest finite number) or
            "padded": bool, with the first text keys of batch row 0 and the queries there masked entirely.
        per_head: the mask differs from head to head.
        sinks: add sink logits.
        softcap: cap on the scores.
        window: of the text.
        padding: batch row b has ``b * padding`` text keys in front that nobody sees (modulo ``S + 1``); 0: None.
        seed: of the random content.
    """

    batch: int = 2
    groups: int = 2
    key_heads: int = 2
    queries: int = 3
    past: int = 2
    width: int = 4
    value_width: int = 4
    segments: tuple[int, ...] = (5,)
    fillers: tuple[str, ...] = ("none",)
    shared: bool = False
    bias: str = "none"
    mask: str = "causal"
    per_head: bool = False
    sinks: bool = False
    softcap: float | None = None
    window: int | None = None
    padding: int = 0
    seed: int = 0

    def build(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", **changes: Any
    ) -> AttentionRequest:
        """The request in ``dtype``; ``changes`` go to ``AttentionRequest``."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)

        heads, text = self.groups * self.key_heads, self.queries + self.past
        segments = []
        for count, fillers in zip(self.segments, self.fillers, strict=True):
            batch = 1 if self.shared else self.batch
            keys = normal(batch, self.key_heads, count, self.width)
            values = normal(batch, self.key_heads, count, self.value_width)
            lengths = None
            if fillers != "none":
                real = torch.rand(self.batch, generator=generator) * (count + 1) if fillers == "some" else None
                lengths = (torch.zeros(self.batch) if real is None else real).long().to(device)
                if not self.shared:
                    filler = torch.arange(count, device=device) >= lengths[:, None]
                    keys[filler[:, None].expand(-1, self.key_heads, -1)] = torch.nan
                    values[filler[:, None].expand(-1, self.key_heads, -1)] = torch.nan
            segments.append(Segment(keys, values, lengths))
        if self.bias != "none":
            segments = [evolve(segment, bias=self._bias(segment, normal)) for segment in segments]
        built: dict[str, Any] = {
            "queries": normal(self.batch, heads, self.queries, self.width) * 2,
            "keys": normal(self.batch, self.key_heads, text, self.width),
            "values": normal(self.batch, self.key_heads, text, self.value_width),
            "scale": 1.3 * self.width**-0.5,  # not the default of anything
            "segments": tuple(segments),
            "mask": self._mask(generator, dtype, device),
            "softcap": self.softcap,
            "sinks": normal(heads) if self.sinks else None,
            "window": self.window,
        }
        if self.padding:
            built["padding"] = (torch.arange(self.batch, device=device) * self.padding) % (text + 1)
        return AttentionRequest(**{**built, **changes})

    def _bias(self, segment: Segment, normal: Callable[..., Tensor]) -> Tensor:
        """``[B or 1, Hkv or 1, P]``."""
        rows, heads = self.bias in ("rows", "all"), self.bias in ("heads", "all")
        count = segment.keys.shape[2]
        bias = normal(self.batch if rows else 1, self.key_heads if heads else 1, count) * 2
        if rows and segment.valid is not None:
            bias[(~segment.valid)[:, None].expand_as(bias)] = torch.nan
        return bias

    def _mask(self, generator: torch.Generator, dtype: torch.dtype, device: torch.device | str) -> Tensor | None:
        if self.mask == "causal":
            return None
        heads, text = self.groups * self.key_heads if self.per_head else 1, self.queries + self.past
        shape = (self.batch, heads, self.queries, text)
        visible = torch.ones(self.queries, text, dtype=torch.bool).tril(self.past).expand(shape).clone()
        if self.mask == "padded":
            padding = self.past + (self.queries + 1) // 2
            visible[0, :, :, :padding] = False
        else:
            visible &= torch.rand(shape, generator=generator) > 0.3
        if self.mask in ("bool", "padded"):
            return visible.to(device)
        bias = torch.randn(shape, generator=generator).to(dtype)
        masked = -torch.inf if self.mask == "additive" else torch.finfo(dtype).min
        return bias.masked_fill(~visible, masked).to(device)


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
