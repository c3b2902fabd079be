"""Plain implementations of a Llama that mplus is measured against, written out without modules.

``BareLayers`` runs over keys and values that are ready: the least that a read can cost. ``PublishedRead`` takes the
steps of the published code. Shapes: ``B`` sequences, ``T`` tokens, ``P`` prefix rows, ``d`` the hidden size, ``H``
heads and ``Hkv`` key heads of width ``D``, ``V`` the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypedDict

import torch
from attrs import define
from torch import Tensor
from torch.nn.functional import linear, pad, scaled_dot_product_attention, silu

from mplus.bench.attention_variants import VARIANTS, fastest

if TYPE_CHECKING:
    from mplus.hf.decoders.bench_models import DecoderWeights, LayerWeights

Norm = Callable[[Tensor, Tensor, float], Tensor]
"""``norm(hidden, weight, eps)``."""


class AttentionChoice(TypedDict, total=False):
    """The attention that the bare layers take, and what each one tried took in milliseconds or why it failed."""

    won: str
    ms: dict[str, float | str]


class BareLayers:
    """A decoder over a prefix of ready keys and values; they lie in one buffer per layer, ``[prefix | room for text]``.

    Text is written behind the prefix in place, so reading again needs no clearing.

    Args:
        weights: of the decoder.
        keys, values: per layer ``[B, Hkv, P, D]``.
        room: the most text tokens.

    Attributes:
        variant: name of the attention in use (``mplus.bench.attention_variants``).
    """

    def __init__(self, weights: DecoderWeights, keys: Sequence[Tensor], values: Sequence[Tensor], room: int) -> None:
        self.weights = weights
        self.prefix = keys[0].shape[2]
        self.keys, self.values = ([pad(part, (0, 0, 0, room)) for part in parts] for parts in (keys, values))
        self.variant = next(iter(VARIANTS))

    def choose_attention(self, length: int, past: int = 0, rounds: int = 3) -> AttentionChoice:
        """Take the fastest attention for ``length`` tokens behind ``past`` others; return what was tried, in ms."""
        keys, values = (part[0][:, :, : self.prefix + past + length] for part in (self.keys, self.values))
        batch, _, _, width = keys.shape
        queries = torch.randn(batch, self.weights.heads, length, width, dtype=keys.dtype, device=keys.device)
        self.variant, tried = fastest(queries, keys, values, rounds)
        return {"won": self.variant, "ms": tried}

    @torch.no_grad()
    def read(self, ids: Tensor, past: int = 0, head: bool = True) -> Tensor:
        """Return logits ``[B, 1, V]`` of the last of ``[B, T]`` tokens behind ``past`` others.

        Without ``head``: the hidden states ``[B, T, d]`` of the last layer.
        """
        weights, attend = self.weights, VARIANTS[self.variant]
        hidden = weights.embedding[ids]
        begin, end = self.prefix + past, self.prefix + past + ids.shape[1]
        rotation = rotary(weights.frequencies, torch.arange(begin, end, device=ids.device), hidden.dtype)
        for layer, keys, values in zip(weights.layers, self.keys, self.values, strict=True):
            normed = fused_norm(hidden, layer.norm, weights.eps)
            queries = rotate(in_heads(linear(normed, layer.queries), weights.heads), *rotation)
            keys[:, :, begin:end] = rotate(in_heads(linear(normed, layer.keys), weights.key_heads), *rotation)
            values[:, :, begin:end] = in_heads(linear(normed, layer.values), weights.key_heads)
            attended = attend(queries, keys[:, :, :end], values[:, :, :end])
            hidden = finish_layer(layer, hidden, attended, weights.eps, fused_norm)
        if not head:
            return hidden
        return linear(fused_norm(hidden[:, -1:], weights.norm, weights.eps), weights.head)


@define(frozen=True, eq=False)
class PublishedRead:
    """A read by the steps of the published code (Wang et al. 2025, arXiv 2502.00592), all of them for every prompt.

    A memory keeps hidden states. Every layer scores all long-term rows by every token, picks and gathers some, joins
    them with the begin row, short-term memory and the text, and projects and rotates all of that.

    Attributes:
        weights: of the decoder.
        project: ``project(layer, [B, T, d])``, queries of the retriever for a layer's normed text.
        begin: per layer ``[1, d]``.
        short_term: per layer ``[N, d]``.
        long_term: per layer ``[M, d]``; on the host, as in the published code, also where the decoder is on a GPU.
        keys: per layer ``[M, r]``, beside ``long_term``.
        births: ``[M]``, the order of writing.
        retrieved_tokens: K0.
    """

    weights: DecoderWeights
    project: Callable[[int, Tensor], Tensor]
    begin: Sequence[Tensor]
    short_term: Sequence[Tensor]
    long_term: Sequence[Tensor]
    keys: Sequence[Tensor]
    births: Tensor
    retrieved_tokens: int

    @torch.no_grad()
    def read(self, ids: Tensor) -> Tensor:
        """Return logits ``[1, 1, V]`` of the last of ``[1, T]`` tokens."""
        weights = self.weights
        hidden = weights.embedding[ids]
        for index in range(len(weights.layers)):
            hidden = self._layer(index, hidden)
        return linear(eager_norm(hidden[:, -1:], weights.norm, weights.eps), weights.head)

    def _layer(self, index: int, text: Tensor) -> Tensor:
        """Return the layer's output ``[1, T, d]`` for the text, with memory in front of it."""
        weights = self.weights
        layer, length = weights.layers[index], text.shape[1]
        retrieved = self._retrieve(index, eager_norm(text, layer.norm, weights.eps))
        # Joined in three steps, as the published code does.
        memory = torch.cat([retrieved, self.short_term[index]])
        joined = torch.cat([torch.cat([self.begin[index], memory])[None], text], 1)
        normed = eager_norm(joined, layer.norm, weights.eps)
        total = joined.shape[1]
        cosine, sine = rotary(weights.frequencies, torch.arange(total, device=text.device), text.dtype)
        queries = in_heads(linear(normed[:, -length:], layer.queries), weights.heads)
        queries = rotate(queries, cosine[-length:], sine[-length:])
        keys = rotate(in_heads(linear(normed, layer.keys), weights.key_heads), cosine, sine)
        values = in_heads(linear(normed, layer.values), weights.key_heads)
        mask = torch.ones(length, total, dtype=torch.bool, device=text.device).tril(total - length)
        attended = scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)
        return finish_layer(layer, text, attended, weights.eps, eager_norm)

    def _retrieve(self, index: int, normed: Tensor) -> Tensor:
        """Return the best rows ``[K0, d]``, oldest first."""
        keys, rows = self.keys[index], self.long_term[index]
        queries = self.project(index, normed)[0]
        scores = torch.sigmoid(queries @ keys.to(queries.device).T).mean(0)
        best = torch.topk(scores, min(self.retrieved_tokens, len(rows))).indices
        best = best.to(rows.device).sort().values
        ordered = best[self.births[best].argsort(stable=True)]
        return rows[ordered].to(normed.device)


# ---------------------------------------------------------------------- the arithmetic of a Llama layer


def fused_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise ``[..., d]`` by PyTorch's own kernel."""
    return torch.nn.functional.rms_norm(hidden, weight.shape, weight, eps)


def eager_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise ``[..., d]`` in steps, as the published code does: at least float32 inside, cast, then the weight."""
    precise = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    precise = precise * torch.rsqrt(precise.pow(2).mean(-1, keepdim=True) + eps)
    return weight * precise.to(hidden.dtype)


def rotary(frequencies: Tensor, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosine and sine ``[n, D]`` of the rotary embedding at ``positions`` ``[n]``."""
    angles = torch.outer(positions.to(frequencies.dtype), frequencies)
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate ``[..., n, D]``; number ``i`` of a head is paired with number ``i + D / 2``."""
    half = states.shape[-1] // 2
    swapped = torch.cat([-states[..., half:], states[..., :half]], -1)
    return states * cosine + swapped * sine


def in_heads(states: Tensor, heads: int) -> Tensor:
    """Reshape ``[B, n, heads * D]`` to ``[B, heads, n, D]``."""
    return states.view(*states.shape[:-1], heads, -1).transpose(1, 2)


def finish_layer(layer: LayerWeights, hidden: Tensor, attended: Tensor, eps: float, norm: Norm) -> Tensor:
    """Return the layer's output ``[B, T, d]`` from its input and what its heads attended to, ``[B, H, T, D]``."""
    hidden = hidden + linear(attended.transpose(1, 2).flatten(2), layer.output)
    normed = norm(hidden, layer.mlp_norm, eps)
    return hidden + linear(silu(linear(normed, layer.gate)) * linear(normed, layer.up), layer.down)


def prefix_keys_values(
    weights: DecoderWeights, rows: Sequence[Tensor], batch: int = 1
) -> tuple[list[Tensor], list[Tensor]]:
    """Return keys and values ``[B, Hkv, P, D]`` of rows ``[P, d]`` of every layer; keys at positions ``0 .. P-1``."""
    keys, values = [], []
    for layer, hidden in zip(weights.layers, rows, strict=True):
        normed = eager_norm(hidden[None], layer.norm, weights.eps)
        positions = torch.arange(hidden.shape[0], device=hidden.device)
        rotation = rotary(weights.frequencies, positions, hidden.dtype)
        key = rotate(in_heads(linear(normed, layer.keys), weights.key_heads), *rotation)
        value = in_heads(linear(normed, layer.values), weights.key_heads)
        keys.append(key.expand(batch, -1, -1, -1).contiguous())
        values.append(value.expand(batch, -1, -1, -1).contiguous())
    return keys, values
