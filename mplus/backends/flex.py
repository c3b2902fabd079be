"""FlexBackend: PyTorch's FlexAttention, compiled for the GPU, over memory and text joined into one sequence."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import Tensor

from mplus.backends.base import AttentionBackend, AttentionRequest, AttentionResult
from mplus.backends.checks import learned_biases, mixed_dtypes
from mplus.backends.joined import joined_bias, joined_keys_values, joined_visibility

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import AuxOutput


class FlexBackend(AttentionBackend):
    """One fused kernel with a gradient for every mask, soft cap and bias, where a compiler for the GPU is there.

    Worth its compilation where many requests of one shape follow one another, as in training on a GPU. On a CPU it
    computes all scores and has no gradient: it is there to be compared.
    """

    name: ClassVar[str] = "flex"
    supports_key_bias: ClassVar[bool] = True

    def __init__(self) -> None:
        self._compiled: Callable[..., tuple[Tensor, AuxOutput]] | None = None

    def unsupported_reasons(self, request: AttentionRequest) -> list[str]:
        """Name dropout, returned weights and mixed dtypes; on a CPU, gradients too."""
        reasons = []
        if request.dropout:
            reasons.append(f"dropout={request.dropout}: FlexAttention drops nothing")
        if request.need_weights:
            reasons.append("need_weights=True: FlexAttention does not return its weights")
        reasons += mixed_dtypes(request, "FlexAttention")
        queries = request.queries
        memory = (part for segment in request.segments for part in (segment.keys, segment.values))
        parts = (queries, request.keys, request.values, *memory)
        learning = torch.is_grad_enabled() and any(part.requires_grad for part in parts)
        if learning and queries.device.type == "cpu":
            reasons.append("a tensor requires a gradient, and FlexAttention has none on a CPU")
        reasons += learned_biases(request, "FlexAttention")
        return reasons

    def attend(self, request: AttentionRequest) -> AttentionResult:
        """Compute the request. Queries that see nothing yield zeros."""
        from torch.nn.attention.flex_attention import AuxRequest, create_block_mask

        keys, values = joined_keys_values(request)
        visible, bias = joined_visibility(request), joined_bias(request)
        batch, heads, length, _ = request.queries.shape
        # Away from the CPU a row without any key is left to no kernel: it sees everything and is cleared afterwards.
        blind = ~visible.any(-1, keepdim=True)
        visible = (visible | blind).expand(batch, heads, length, -1)

        def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return visible[b, h, query, key]

        softcap = request.softcap
        wide = None if bias is None else bias.expand(batch, heads, length, -1)

        def changed(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            if softcap is not None:
                score = softcap * torch.tanh(score / softcap)
            score = score if wide is None else score + wide[b, h, query, key]
            return score if mask is not None else score.masked_fill(~visible[b, h, query, key], -torch.inf)

        device = request.queries.device
        mask = None  # all scores are computed on a CPU, whatever the mask leaves out
        if device.type != "cpu":
            mask = create_block_mask(seen, batch, heads, length, keys.shape[2], device=str(device))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*flex_attention called without torch.compile")  # on a CPU
            output, aux = self._flex(device)(
                request.queries,
                keys,
                values,
                score_mod=changed,
                block_mask=mask,
                scale=request.scale,
                enable_gqa=heads != keys.shape[1],
                return_aux=AuxRequest(lse=True),
            )
        if request.sinks is not None and aux.lse is not None:
            # A sink takes its part of the softmax: exp(l) of exp(l) + exp(sink) is left to the keys.
            left = torch.sigmoid(aux.lse - request.sinks.to(aux.lse)[:, None]).unsqueeze(-1)
            output = output * left.to(output.dtype)
        return AttentionResult(output.masked_fill(blind, 0))

    def _flex(self, device: torch.device) -> Callable[..., tuple[Tensor, AuxOutput]]:
        from torch.nn.attention.flex_attention import flex_attention

        plain = cast("Callable[..., tuple[Tensor, AuxOutput]]", flex_attention)  # with return_aux it returns both
        if device.type == "cpu":
            return plain
        if self._compiled is None:
            self._compiled = torch.compile(plain, dynamic=True)
        return self._compiled
