"""Random rows and attention requests, the same for the same seed; for suites and for checks on other devices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from attrs import define, evolve
from torch import Tensor

from mplus.backends.base import AttentionRequest, Segment
from mplus.rows import NO_SOURCE, MemoryRows
from mplus.stores.base import StoreLayout

if TYPE_CHECKING:
    from collections.abc import Callable


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
