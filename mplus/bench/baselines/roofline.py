"""The same layers over a prefix of ready keys and values, with nothing around them: the floor of a read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from mplus.bench.baselines.layers import finish, fused_norm, in_heads, rotary, rotate
from mplus.bench.baselines.variants import VARIANTS, fastest

if TYPE_CHECKING:
    from mplus.hf.decoders.bench_models import DecoderWeights


class Floor:
    """A decoder without modules; keys and values lie in one buffer per layer, ``[prefix | room for text]``.

    Text is written behind the prefix in place, so reading again needs no clearing.

    Args:
        weights: of the decoder.
        keys, values: per layer ``[B, Hkv, P, D]``.
        room: most text tokens.

    Attributes:
        variant: name of the attention in use (``mplus.bench.baselines.variants``).
    """

    def __init__(self, weights: DecoderWeights, keys: Sequence[Tensor], values: Sequence[Tensor], room: int) -> None:
        self.weights = weights
        self.prefix = keys[0].shape[2]
        self.keys, self.values = ([_with_room(part, room) for part in parts] for parts in (keys, values))
        self.variant = next(iter(VARIANTS))

    def choose(self, length: int, past: int = 0, rounds: int = 3) -> dict[str, Any]:
        """Take the fastest attention for ``length`` tokens behind ``past`` others; what was tried and how fast."""
        keys, values = (part[0][:, :, : self.prefix + past + length] for part in (self.keys, self.values))
        batch, _, _, width = keys.shape
        queries = torch.randn(batch, self.weights.heads, length, width, dtype=keys.dtype, device=keys.device)
        self.variant, tried = fastest(queries, keys, values, rounds)
        return {"won": self.variant, "ms": tried}

    @torch.no_grad()
    def read(self, ids: Tensor, past: int = 0, head: bool = True) -> Tensor:
        """Logits ``[B, 1, V]`` of the last of ``[B, T]`` tokens behind ``past`` others; ``head`` False: all hidden."""
        weights, attend = self.weights, VARIANTS[self.variant]
        hidden = weights.embedding[ids]
        begin, end = self.prefix + past, self.prefix + past + ids.shape[1]
        turn = rotary(weights.frequencies, torch.arange(begin, end, device=ids.device), hidden.dtype)
        for layer, keys, values in zip(weights.layers, self.keys, self.values, strict=True):
            normed = fused_norm(hidden, layer.norm, weights.eps)
            queries = rotate(in_heads(linear(normed, layer.queries), weights.heads), *turn)
            keys[:, :, begin:end] = rotate(in_heads(linear(normed, layer.keys), weights.key_heads), *turn)
            values[:, :, begin:end] = in_heads(linear(normed, layer.values), weights.key_heads)
            attended = attend(queries, keys[:, :, :end], values[:, :, :end])
            hidden = finish(layer, hidden, attended, weights.eps, fused_norm)
        if not head:
            return hidden
        return linear(fused_norm(hidden[:, -1:], weights.norm, weights.eps), weights.head)


def _with_room(part: Tensor, room: int) -> Tensor:
    batch, heads, rows, width = part.shape
    whole = part.new_zeros(batch, heads, rows + room, width)
    whole[:, :, :rows] = part
    return whole
