"""Gradients of attention one part of the keys at a time, from the output and the log-sum-exp of all parts together."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Visibility = Callable[[int, int], Tensor | None]
"""``visible(start, stop)``: bool, broadcastable to ``[B, H, T, stop - start]``, which of the keys from ``start`` to
``stop`` each query sees; None: all of them."""


def memory_visibility(lengths: Tensor | None) -> Visibility:
    """Let every query see the first ``lengths[b]`` rows of a segment; None: all of them."""

    def visible(start: int, stop: int) -> Tensor | None:
        if lengths is None:
            return None
        return (torch.arange(start, stop, device=lengths.device) < lengths[:, None])[:, None, None]

    return visible


def text_visibility(
    length: int, text: int, device: torch.device, *, window: int | None = None, padding: Tensor | None = None
) -> Visibility:
    """Let queries see text causally, with window and padding, as in ``AttentionRequest``."""

    def visible(start: int, stop: int) -> Tensor | None:
        place = torch.arange(start, stop, device=device)
        own = torch.arange(text - length, text, device=device)[:, None]
        seen = place <= own
        if window is not None:
            seen = seen & (place > own - window)
        seen = seen[None, None]
        if padding is not None:
            seen = seen & (place >= padding[:, None])[:, None, None]
        return seen

    return visible


def row_products(grad_output: Tensor, output: Tensor) -> Tensor:
    """Return ``delta`` ``[B, H, T]``: the product of each output with its gradient, in float32 or better."""
    dtype = torch.promote_types(output.dtype, torch.float32)
    return (grad_output.to(dtype) * output.to(dtype)).sum(-1)


def sink_gradient(sinks: Tensor, delta: Tensor, log_sums: Tensor) -> Tensor:
    """Return the gradient ``[H]`` of the sinks: they take weight, and give nothing to the output."""
    column = sinks.to(log_sums.dtype)[:, None]
    return -((column - log_sums).exp() * delta).sum((0, 2))


def partial_backward(
    grad_output: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    delta: Tensor,
    log_sums: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    visible: Visibility | None = None,
    bias: Tensor | None = None,
    chunk: int = 1024,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Compute the exact share of the gradients that one part of the keys has; scores are computed again, in chunks.

    Differentiating a merge of partial attentions part by part, each with the output and the log-sum-exp of its own,
    is wrong: the weights of a part depend on all parts. With those of the merged attention the parts are independent.

    Args:
        grad_output: ``[B, H, T, Dv]``, gradient of the output of the whole attention.
        queries: ``[B, H, T, D]``.
        keys, values: ``[B or 1, Hkv, N, D]`` and ``[B or 1, Hkv, N, Dv]``. Rows no query sees may hold anything.
        delta: ``[B, H, T]``, of the whole attention, see ``row_products``.
        log_sums: ``[B, H, T]``, log-sum-exp of the whole attention, sinks included; -inf where a query sees nothing.
        scale: factor on the scores.
        softcap: as in ``AttentionRequest``.
        visible: which of the keys each query sees; None: all of them.
        bias: ``[B or 1, Hkv or 1, N]``, as in ``Segment``; None: nothing is added to the scores.
        chunk: keys at a time; ``[B, H, T, chunk]`` numbers are held.

    Returns:
        Gradients of queries, keys, values and bias (None where there is none) in float32, or float64 where the queries
        are; those of the queries have to be summed over the parts.
    """
    batch, heads, length, width = queries.shape
    key_heads, rows = keys.shape[1], keys.shape[2]
    dtype = torch.promote_types(queries.dtype, torch.float32)

    def folded(part: Tensor) -> Tensor:
        """Fold ``[B, H, T, ..]`` to ``[B, Hkv, G * T, ..]``."""
        return part.to(dtype).reshape(batch, key_heads, heads // key_heads * length, *part.shape[3:])

    q, grad = folded(queries), folded(grad_output)
    # Where a query sees nothing, exp(score - inf) = 0 is the weight of every key.
    whole = folded(log_sums.masked_fill(log_sums == -torch.inf, torch.inf))[..., None]
    inner = folded(delta)[..., None]
    grad_queries = torch.zeros_like(q)
    grad_keys, grad_values = (torch.zeros(part.shape, dtype=dtype, device=part.device) for part in (keys, values))
    grad_bias = None if bias is None else torch.zeros(bias.shape, dtype=dtype, device=bias.device)
    with torch.autocast(queries.device.type, enabled=False):  # it would take the products to half precision
        for start in range(0, rows, chunk):
            stop = min(start + chunk, rows)
            k, v = keys[:, :, start:stop].to(dtype), values[:, :, start:stop].to(dtype)
            hidden = None
            seen = None if visible is None else visible(start, stop)
            if seen is not None:
                # Masking weights does not suffice: zero times what an unseen row holds may be NaN.
                unseen = ~seen.any(2).any(1)[:, None, :, None]
                k, v = k.masked_fill(unseen, 0), v.masked_fill(unseen, 0)
                hidden = ~seen.expand(-1, heads if seen.shape[1] > 1 else 1, length, -1)
            scores = q @ k.mT * scale
            slope: Tensor | float = scale
            if softcap is not None:
                capped = torch.tanh(scores / softcap)
                scores, slope = softcap * capped, scale * (1 - capped**2)
            if bias is not None:
                scores = scores + bias[:, :, None, start:stop].to(dtype)  # NaN at fillers goes with their weights
            weights = (scores - whole).exp()
            if hidden is not None:
                spread = weights.view(batch, key_heads, heads // key_heads, length, stop - start)
                hidden = hidden[:, :, None] if hidden.shape[1] == 1 else hidden.unflatten(1, (key_heads, -1))
                weights = spread.masked_fill(hidden, 0).view_as(weights)
            grad_scores = weights * (grad @ v.mT - inner)
            if bias is not None and grad_bias is not None:
                # Behind the soft cap, so before its slope; summed over the queries, and over what shares the bias.
                grad_bias[:, :, start:stop] = grad_scores.sum(2).sum_to_size(*bias.shape[:2], stop - start)
            grad_scores = grad_scores * slope
            grad_queries += grad_scores @ k
            grad_keys[:, :, start:stop] = _like(grad_scores.mT @ q, keys)
            grad_values[:, :, start:stop] = _like(weights.mT @ grad, values)
    return grad_queries.view(batch, heads, length, width), grad_keys, grad_values, grad_bias


def _like(gradient: Tensor, part: Tensor) -> Tensor:
    """Sum a gradient over the batch where the batch shares the part."""
    return gradient.sum(0, keepdim=True) if part.shape[0] == 1 else gradient
