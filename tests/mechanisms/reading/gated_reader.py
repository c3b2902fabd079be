"""A mechanism like MemLong: some layers read the keys and values of one, behind a gate, chosen anew by every token."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from attrs import evolve
from torch import Tensor, nn

from mplus.mechanisms.decoder import Attended, Compute, Project
from mplus.mechanisms.kv.mechanism import KvMechanism

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mplus.backends.base import AttentionRequest, AttentionResult
    from mplus.mechanisms.decoder import DecoderShape
    from mplus.mechanisms.opened import Opened, Retrieved

BANK_LAYER, READING = 2, (2, 4)


class Gates(nn.Module):
    """Both halved at the start."""

    def __init__(self, layers: int, heads: int) -> None:
        super().__init__()
        self.gates = nn.Parameter(torch.zeros(layers, heads))


class GatedReader(KvMechanism):
    """Scores of memory times s, those of text times 1 - s, in one softmax; s is a number of each head of keys.

    Chunks are kept, and chosen by all text so far, as "kv" does it.
    """

    name = "gated"
    attends = True

    @classmethod
    def build(cls, shape: DecoderShape, config: Any, options: Any) -> nn.Module:
        return Gates(shape.layers, shape.key_heads)

    def prefix(  # type: ignore[override]
        self, opened: Opened, layer: int, found: Sequence[Retrieved | None], hidden: Tensor, project: Project
    ) -> Attended | None:
        if opened.own is None or layer not in READING:
            return None
        segments = opened.own.front.segments(BANK_LAYER, hidden)
        return Attended(segments, partial(self.gated, layer)) if segments else None

    def gated(self, layer: int, request: AttentionRequest, compute: Compute) -> AttentionResult:
        share: Any = self.additions.gates[layer].sigmoid()  # type: ignore[index]
        queries = (1 - share).repeat_interleave(request.queries.shape[1] // len(share))[:, None, None]
        ratio = (share / (1 - share))[:, None, None]
        segments = tuple(evolve(one, keys=one.keys * ratio) for one in request.segments)
        return compute(evolve(request, queries=request.queries * queries, segments=segments, joined=None))
