"""ReferenceBackend: attention written out, for every request; the specification of the other backends."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from mplus.backends.base import AttentionBackend, AttentionRequest, AttentionResult
from mplus.backends.joined import joined_bias, joined_keys_values, joined_visibility


class ReferenceBackend(AttentionBackend):
    """All scores at once, computed in at least float32.

    A query that sees nothing yields zeros. Entries of an additive mask at or below half the smallest number of their
    dtype mean "not visible".
    """

    name: ClassVar[str] = "reference"
    supports_key_bias: ClassVar[bool] = True

    def unsupported_reasons(self, request: AttentionRequest) -> list[str]:
        """Return nothing: it can run every request."""
        return []

    def attend(self, request: AttentionRequest) -> AttentionResult:
        """Compute the request, weights included; ``weights`` are those after dropout."""
        dtype = torch.promote_types(request.queries.dtype, torch.float32)
        keys, values = (_per_query_head(part.to(dtype), request) for part in joined_keys_values(request))
        scores = request.queries.to(dtype) @ keys.transpose(-1, -2) * request.scale
        if request.softcap is not None:
            scores = request.softcap * torch.tanh(scores / request.softcap)
        bias = joined_bias(request)
        if bias is not None:
            scores = scores + bias
        visible = joined_visibility(request)
        weights = _softmax(scores, visible, request.sinks)
        weights = torch.nn.functional.dropout(weights, request.dropout)
        output = (weights @ values).to(request.queries.dtype)
        return AttentionResult(output, weights.to(request.queries.dtype) if request.need_weights else None)


def _per_query_head(part: Tensor, request: AttentionRequest) -> Tensor:
    return part.repeat_interleave(request.queries.shape[1] // part.shape[1], dim=1)


def _softmax(scores: Tensor, visible: Tensor, sinks: Tensor | None) -> Tensor:
    """Apply softmax over the visible scores and the sink of each head; the sink's share is left out."""
    count = scores.shape[-1]
    # A row of -inf only would be NaN, in the gradient too; it is computed as a row of zeros and then hidden.
    scores = scores.masked_fill(~visible, -torch.inf).masked_fill(~visible.any(-1, keepdim=True), 0)
    if sinks is not None:
        column = sinks.to(scores)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    return scores.softmax(-1)[..., :count].masked_fill(~visible, 0)
