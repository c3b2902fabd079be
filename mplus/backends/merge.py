"""MergeBackend: attention to every piece of memory by itself, merged by log-sum-exp; nothing is joined or copied."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mplus.backends.base import AttentionBackend, AttentionRequest, AttentionResult
from mplus.backends.checks import learned_biases
from mplus.backends.parts import Part, mergeable, parts_of

if TYPE_CHECKING:
    from collections.abc import Sequence


class MergeBackend(AttentionBackend):
    """Partial attention per segment by PyTorch's CPU kernel, merged exactly.

    Query rows that share a head of keys are packed, so memory is read once for all of them, and once for a whole batch
    where it is shared. Segments may lie anywhere; fillers are not even looked at. With ``o_i`` the attention to part i
    alone and ``l_i`` its log-sum-exp, the whole is ``sum_i exp(l_i - l) o_i`` with ``l = logsumexp_i l_i``.
    """

    name: ClassVar[str] = "merge"
    supports_key_bias: ClassVar[bool] = True

    def unsupported_reasons(self, request: AttentionRequest) -> list[str]:
        """Name what the kernel lacks: other devices, soft caps, dropout, weights, mixed dtypes, narrower values."""
        reasons = mergeable(request)
        if request.softcap is not None:
            reasons.append(f"softcap={request.softcap}: the kernel cannot cap scores")
        if request.dropout:
            reasons.append(f"dropout={request.dropout}: parts cannot be dropped alike")
        if request.need_weights:
            reasons.append("need_weights=True: the kernel does not return its weights")
        if request.mask is not None and request.mask.requires_grad:
            reasons.append("mask requires a gradient, which the kernel does not give")
        reasons += learned_biases(request, "the kernel")
        return reasons

    def attend(self, request: AttentionRequest) -> AttentionResult:
        """Compute the request. Queries that see nothing yield zeros."""
        parts = parts_of(request)
        tensors = (request.queries, request.sinks, *(tensor for part in parts for tensor in part.tensors))
        if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
            output: Tensor = _Merged.apply(request.scale, parts, *tensors)  # type: ignore[no-untyped-call]
            return AttentionResult(output)
        return AttentionResult(_forward(request.queries, request.sinks, parts, request.scale)[0])


def _forward(queries: Tensor, sinks: Tensor | None, parts: Sequence[Part], scale: float) -> tuple[Tensor, Tensor]:
    """Return the output ``[B, H, T, D]`` and the log-sum-exp ``[B, H, T]`` of all scores, sinks among them."""
    found = [part.attend(queries, part.keys, part.values, scale) for part in parts]
    certain = any(not part.partial for part in parts)  # every query sees something
    if len(found) == 1 and sinks is None and certain:
        return found[0]
    outputs, sums = torch.stack([output for output, _ in found]), torch.stack([lse for _, lse in found])
    total = sums[0]
    for lse in sums[1:]:  # torch.logsumexp takes ten times as long for so few numbers
        total = torch.logaddexp(total, lse)
    if sinks is not None:
        total = torch.logaddexp(total, sinks.to(total)[:, None])
    if not certain:
        # A query that sees nothing at all: any finite number will do, since all its shares are exp(-inf).
        total = total.masked_fill(total == -torch.inf, 0)
    shares = (sums - total).exp_().unsqueeze(-1)
    return (outputs.to(total.dtype) * shares).sum(0).to(queries.dtype), total


class _Context(Protocol):
    """The things that the forward of ``_Merged`` leaves for its backward."""

    scale: float
    parts: list[Part]
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


class _Merged(torch.autograd.Function):
    """The merge with its gradient.

    Autograd through the merge would be wrong without a word: the log-sum-exp that the kernel returns carries no
    gradient. Each part's own backward is right once it is given the output and the log-sum-exp of the whole, since
    ``p = exp(score - l)`` are then the weights of the whole, and ``sum p dp = do . o`` too.
    """

    @staticmethod
    def forward(
        ctx: _Context, scale: float, parts: Sequence[Part], queries: Tensor, sinks: Tensor | None, *tensors: Tensor
    ) -> Tensor:
        output, total = _forward(queries, sinks, parts, scale)
        ctx.save_for_backward(queries, sinks, output, total, *tensors)
        ctx.scale, ctx.parts = scale, [part.without_tensors() for part in parts]
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, gradient: Tensor) -> tuple[Tensor | None, ...]:
        queries, sinks, output, total, *tensors = ctx.saved_tensors
        # It may be expanded, as that of a sum is, with strides of 0.
        gradient = gradient.contiguous()
        towards_queries = torch.zeros_like(queries, dtype=total.dtype)
        towards_rows: list[Tensor] = []
        for index, part in enumerate(ctx.parts):
            keys, values = tensors[2 * index : 2 * index + 2]
            dq, dk, dv = part.backward(gradient, queries, keys, values, output, total, ctx.scale)
            towards_queries += dq
            towards_rows += [dk, dv]
        towards_sinks = None
        if sinks is not None and ctx.needs_input_grad[3]:
            share = (sinks.to(total)[:, None] - total).exp()
            towards_sinks = -(share * (gradient * output).sum(-1, dtype=total.dtype)).sum((0, 2)).to(sinks.dtype)
        return (None, None, towards_queries.to(queries.dtype), towards_sinks, *towards_rows)
