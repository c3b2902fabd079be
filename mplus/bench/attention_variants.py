"""Attention of text over a prefix and itself by PyTorch's public functions; the fastest is what others are held to."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from mplus.timing import Arm, in_rounds, median

AttentionVariant = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``variant(queries [B, H, T, D], keys [B, Hkv, S, D], values)``: causal, aligned at the bottom right."""


def grouped(queries: Tensor, keys: Tensor, values: Tensor, *, additive: bool) -> Tensor:
    """Attend ``[B, H, T, D]`` to ``[B, Hkv, S, D]``; the kernel groups the heads, the mask is additive or boolean."""
    return _attend(queries, keys, values, _mask(queries, keys, queries.dtype if additive else None, 1))


def lower_right(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attend with PyTorch's ``causal_lower_right``."""
    bias = None if queries.shape[2] == 1 else causal_lower_right(queries.shape[2], keys.shape[2])
    return _attend(queries, keys, values, bias)


def packed(queries: Tensor, keys: Tensor, values: Tensor, *, additive: bool) -> Tensor:
    """Attend with the heads of a group as further rows of one head, and a mask that is additive or of booleans."""
    batch, heads, length, width = queries.shape
    groups = heads // keys.shape[1]
    rows = queries.reshape(batch, keys.shape[1], groups * length, width)
    mask = _mask(queries, keys, queries.dtype if additive else None, groups)
    return scaled_dot_product_attention(rows, keys, values, attn_mask=mask).reshape(batch, heads, length, width)


def written_out(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attend with heads packed as in ``packed``, by two products and a softmax.

    Raises:
        ValueError: there are more than ``MOST_QUERIES`` queries.
    """
    batch, heads, length, width = queries.shape
    if length > MOST_QUERIES:
        raise ValueError(f"scores are written out for at most {MOST_QUERIES} queries, got {length}")
    groups = heads // keys.shape[1]
    rows = queries.reshape(batch, keys.shape[1], groups * length, width) * width**-0.5
    scores = rows @ keys.mT
    mask = _mask(queries, keys, queries.dtype, groups)
    if mask is not None:
        # Nothing of the prefix is hidden from any query.
        scores[..., -length:] += mask[:, -length:]
    attended: Tensor = scores.softmax(-1) @ values
    return attended.reshape(batch, heads, length, width)


MOST_QUERIES = 64
"""The most queries of ``written_out``, which holds all their scores."""

VARIANTS: Mapping[str, AttentionVariant] = {
    "bool mask": functools.partial(grouped, additive=False),
    "float mask": functools.partial(grouped, additive=True),
    "causal_lower_right": lower_right,
    "packed groups, bool mask": functools.partial(packed, additive=False),
    "packed groups, float mask": functools.partial(packed, additive=True),
    "packed groups, written out": written_out,
}


def fastest(queries: Tensor, keys: Tensor, values: Tensor, rounds: int = 3) -> tuple[str, dict[str, float | str]]:
    """Return the fastest variant for such a case, and of each the median in milliseconds or why it failed."""
    found: dict[str, float | str] = {}
    arms = []
    for name, variant in VARIANTS.items():
        try:
            variant(queries, keys, values)
        except (RuntimeError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"
        else:
            arms.append(Arm(name, lambda _, variant=variant: variant(queries, keys, values)))  # type: ignore[misc]
    times = in_rounds(arms, rounds, queries.device)
    found.update({name: round(1000 * median(taken), 4) for name, taken in times.items()})
    return min(times, key=lambda name: median(times[name])), found


def _attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    grouped = queries.shape[1] != keys.shape[1]
    return scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=grouped)


def _mask(queries: Tensor, keys: Tensor, dtype: torch.dtype | None, groups: int) -> Tensor | None:
    """Return the causal mask ``[groups * T, S]``; None for a single query, which sees everything."""
    if queries.shape[2] == 1:
        return None
    return _cached_mask(queries.shape[2], keys.shape[2], dtype, groups, queries.device)


# Cached, so that making masks is not part of what is timed.
@functools.lru_cache(maxsize=8)
def _cached_mask(length: int, total: int, dtype: torch.dtype | None, groups: int, device: torch.device) -> Tensor:
    visible = torch.ones(length, total, dtype=torch.bool, device=device).tril(total - length).repeat(groups, 1)
    if dtype is None:
        return visible
    return torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill(~visible, -torch.inf)
