"""Parts of a layer's attention, computed by themselves and merged by log-sum-exp: for mechanisms with ``Attended``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from attrs import define
from torch import Tensor

from mplus.backends.base import AttentionRequest, AttentionResult
from mplus.backends.joined import joined_bias, joined_keys_values, joined_visibility
from mplus.errors import NotSupported


@define(frozen=True, eq=False)
class PartialAttention:
    """Attention of every query to some of its keys.

    With ``o_i`` the attention to part i alone and ``l_i`` its log-sum-exp, the attention to all parts is
    ``sum_i exp(l_i - l) o_i`` with ``l = logsumexp_i l_i``. Adding the logarithm of a weight to ``l_i`` gates a part.

    Attributes:
        output: ``[B, H, T, Dv]``.
        log_sum: ``[B, H, T]`` float32 or wider, the log-sum-exp of its scores; -inf where a query sees no key.

    Example:
        >>> def attend(request, compute):  # text and memory in two softmaxes, each query with memory of its own
        ...     text = attend_to_request(evolve(request, segments=(), joined=None), compute)
        ...     return merged([attend_per_query(request, keys, values), text])
    """

    output: Tensor
    log_sum: Tensor


def attend_to_request(
    request: AttentionRequest, compute: Callable[[AttentionRequest], AttentionResult]
) -> PartialAttention:
    """Return the attention that ``request`` asks for, by the decoder's backend, with its log-sum-exp.

    Raises:
        NotSupported: the decoder has sinks, which belong to no part, or its attention weights are asked for.
    """
    if request.sinks is not None or request.need_weights:
        what = "attention sinks" if request.sinks is not None else "attention weights (attn_implementation='eager')"
        raise NotSupported(f"attention that is merged of parts does not go with {what}: use another decoder or setting")
    dtype = torch.promote_types(request.queries.dtype, torch.float32)
    keys, _ = joined_keys_values(request)
    keys = keys.repeat_interleave(request.queries.shape[1] // keys.shape[1], 1).to(dtype)
    scores = _scores(request, request.queries.to(dtype) @ keys.transpose(-1, -2))
    bias = joined_bias(request)
    scores = scores if bias is None else scores + bias
    log_sum = scores.masked_fill(~joined_visibility(request), -torch.inf).logsumexp(-1)
    return PartialAttention(compute(request).output, log_sum)


def attend_per_query(
    request: AttentionRequest, keys: Tensor, values: Tensor, visible: Tensor | None = None
) -> PartialAttention:
    """Return the attention of each query to keys of its own.

    Args:
        request: gives queries, scale and soft cap.
        keys: ``[B, Hkv, T, k, D]`` or ``[B, H, T, k, D]``, rotated where the decoder rotates keys.
        values: ``[B, Hkv, T, k, Dv]`` or ``[B, H, T, k, Dv]``.
        visible: broadcastable to ``[B, H, T, k]`` bool, False at fillers; None: all keys are real.
    """
    dtype, heads = torch.promote_types(request.queries.dtype, torch.float32), request.queries.shape[1]
    keys, values = (part.repeat_interleave(heads // part.shape[1], 1).to(dtype) for part in (keys, values))
    scores = _scores(request, (keys @ request.queries.to(dtype)[..., None])[..., 0])
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    log_sum = scores.logsumexp(-1)
    weights = (scores - log_sum.masked_fill(log_sum == -torch.inf, 0)[..., None]).exp()
    output = (weights[..., None, :] @ values)[..., 0, :]
    return PartialAttention(output.to(request.queries.dtype), log_sum)


def merged(parts: Sequence[PartialAttention]) -> AttentionResult:
    """Return the attention to all parts together; zeros where a query sees no key of any."""
    log_sums = torch.stack([part.log_sum for part in parts])
    total = log_sums.logsumexp(0)
    shares = (log_sums - total.masked_fill(total == -torch.inf, 0)).exp()[..., None]
    outputs = torch.stack([part.output for part in parts])
    return AttentionResult((shares * outputs).sum(0).to(outputs.dtype))


def _scores(request: AttentionRequest, products: Tensor) -> Tensor:
    """Return scaled and capped scores of the products of queries and keys."""
    scores = products * request.scale
    return scores if request.softcap is None else request.softcap * torch.tanh(scores / request.softcap)
