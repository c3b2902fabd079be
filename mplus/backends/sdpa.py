"""SdpaBackend: PyTorch's fused attention over memory and text joined into one sequence."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from mplus.backends.base import AttentionBackend, AttentionRequest, AttentionResult
from mplus.backends.checks import mixed_dtypes
from mplus.backends.joined import joined_bias, joined_keys_values, joined_visibility


class SdpaBackend(AttentionBackend):
    """``scaled_dot_product_attention`` with the least mask that the request allows.

    Keys and values of memory and text are copied into one tensor on every call.
    """

    name: ClassVar[str] = "sdpa"
    supports_key_bias: ClassVar[bool] = True

    def unsupported_reasons(self, request: AttentionRequest) -> list[str]:
        """Name soft caps, sinks, returned weights and mixed dtypes, where the request has them."""
        reasons = []
        if request.softcap is not None:
            reasons.append(f"softcap={request.softcap}: scaled_dot_product_attention cannot cap scores")
        if request.sinks is not None:
            reasons.append(f"sinks {list(request.sinks.shape)}: scaled_dot_product_attention has no sink logits")
        if request.need_weights:
            reasons.append("need_weights=True: scaled_dot_product_attention does not return its weights")
        return reasons + mixed_dtypes(request, "scaled_dot_product_attention", biases=True)

    def attend(self, request: AttentionRequest) -> AttentionResult:
        """Compute the request. Queries that see nothing yield zeros."""
        queries = request.queries
        keys, values = joined_keys_values(request)
        mask, is_causal, blind = _mask(request)
        grouped = queries.shape[1] != keys.shape[1]
        if grouped and mask is not None and queries.device.type != "cpu":
            # Away from the CPU the kernels that take a mask know no groups, and PyTorch would fall back to a slow path.
            groups = queries.shape[1] // keys.shape[1]
            keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
            grouped = False
        output = torch.nn.functional.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=mask,
            dropout_p=request.dropout,
            is_causal=is_causal,
            scale=request.scale,
            enable_gqa=grouped,
        )
        return AttentionResult(output if blind is None else output.masked_fill(blind, 0))


def _mask(request: AttentionRequest) -> tuple[Tensor | None, bool, Tensor | None]:
    """Return ``attn_mask``, ``is_causal``, and the queries ``[., ., T, 1]`` that see no key; None: there are none."""
    plain = request.mask is None and request.window is None and request.padding is None
    if plain and all(segment.lengths is None and segment.bias is None for segment in request.segments):
        length, text = request.queries.shape[2], request.keys.shape[2]
        if length == 1:
            return None, False, None
        if length == text and not any(segment.keys.shape[2] for segment in request.segments):
            return None, True, None
    visible, blind = joined_visibility(request), None
    always = any(segment.lengths is None and segment.keys.shape[2] for segment in request.segments)
    if not always and (request.mask is not None or request.padding is not None):
        # What kernels make of a row without a key differs, so such queries see everything and are cleared afterwards.
        blind = ~visible.any(-1, keepdim=True)
        visible = visible | blind
    bias = joined_bias(request)
    if bias is None:
        return visible, False, blind
    return bias.to(request.queries.dtype).masked_fill(~visible, -torch.inf), False, blind
