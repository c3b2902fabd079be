"""The arithmetic of a Llama layer, written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mplus.hf.decoders.bench_models import DecoderWeights, LayerWeights

Norm = Callable[[Tensor, Tensor, float], Tensor]
"""``norm(hidden, weight, eps)``."""


def fused_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """PyTorch's own."""
    return torch.nn.functional.rms_norm(hidden, weight.shape, weight, eps)


def eager_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """In steps, as in the published code: at least float32 inside, cast, then the weight."""
    precise = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    precise = precise * torch.rsqrt(precise.pow(2).mean(-1, keepdim=True) + eps)
    return weight * precise.to(hidden.dtype)


def rotary(frequencies: Tensor, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``[n, D]`` at ``positions`` ``[n]``."""
    angles = torch.outer(positions.to(frequencies.dtype), frequencies)
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """``[..., n, D]`` rotated; the halves of a head belong together."""
    half = states.shape[-1] // 2
    turned = torch.cat([-states[..., half:], states[..., :half]], -1)
    return states * cosine + turned * sine


def in_heads(states: Tensor, heads: int) -> Tensor:
    """``[B, n, heads * D]`` -> ``[B, heads, n, D]``."""
    return states.view(*states.shape[:-1], heads, -1).transpose(1, 2)


def finish(layer: LayerWeights, hidden: Tensor, attended: Tensor, eps: float, norm: Norm) -> Tensor:
    """From the heads' output ``[B, H, T, D]`` to the layer's."""
    hidden = hidden + linear(attended.transpose(1, 2).flatten(2), layer.output)
    normed = norm(hidden, layer.mlp_norm, eps)
    return hidden + linear(silu(linear(normed, layer.gate)) * linear(normed, layer.up), layer.down)


def prefix_keys_values(
    weights: DecoderWeights, rows: Sequence[Tensor], batch: int = 1
) -> tuple[list[Tensor], list[Tensor]]:
    """Keys, rotated for positions ``0 .. P-1``, and values ``[B, Hkv, P, D]`` of rows ``[P, d]`` of every layer."""
    keys, values = [], []
    for layer, hidden in zip(weights.layers, rows, strict=True):
        normed = eager_norm(hidden[None], layer.norm, weights.eps)
        place = torch.arange(hidden.shape[0], device=hidden.device)
        turn = rotary(weights.frequencies, place, hidden.dtype)
        key = rotate(in_heads(linear(normed, layer.keys), weights.key_heads), *turn)
        value = in_heads(linear(normed, layer.values), weights.key_heads)
        keys.append(key.expand(batch, -1, -1, -1).contiguous())
        values.append(value.expand(batch, -1, -1, -1).contiguous())
    return keys, values
