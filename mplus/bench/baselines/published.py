"""What the published code does with a prompt, rendered in plain PyTorch: all of it anew for every prompt.

Wang et al. 2025 (arXiv 2502.00592) keep hidden states. Every layer scores all long-term rows by every token, picks and
gathers some, joins them with the begin row, short-term memory and the text, and projects and rotates all of that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from attrs import define
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from mplus.bench.baselines.layers import eager_norm, finish, in_heads, rotary, rotate

if TYPE_CHECKING:
    from mplus.hf.decoders.bench_models import DecoderWeights


@define(frozen=True, eq=False)
class PublishedRead:
    """A memory read in the published way.

    Attributes:
        weights: of the decoder.
        project: queries of the retriever for a layer's normed text, ``project(layer, [B, T, d])``.
        begin: per layer ``[1, d]``.
        short_term: per layer ``[N, d]``.
        long_term: per layer ``[M, d]``; where the decoder is not on the CPU these may be, as in the published code.
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
        """Logits ``[1, 1, V]`` of the last of ``[1, T]`` tokens."""
        weights = self.weights
        hidden = weights.embedding[ids]
        for index in range(len(weights.layers)):
            hidden = self._layer(index, hidden)
        return linear(eager_norm(hidden[:, -1:], weights.norm, weights.eps), weights.head)

    def _layer(self, index: int, text: Tensor) -> Tensor:
        weights = self.weights
        layer, length = weights.layers[index], text.shape[1]
        found = self._retrieve(index, eager_norm(text, layer.norm, weights.eps))
        memory = torch.cat([found, self.short_term[index]])
        whole = torch.cat([torch.cat([self.begin[index], memory])[None], text], 1)
        normed = eager_norm(whole, layer.norm, weights.eps)
        total = whole.shape[1]
        cosine, sine = rotary(weights.frequencies, torch.arange(total, device=text.device), text.dtype)
        queries = in_heads(linear(normed[:, -length:], layer.queries), weights.heads)
        queries = rotate(queries, cosine[-length:], sine[-length:])
        keys = rotate(in_heads(linear(normed, layer.keys), weights.key_heads), cosine, sine)
        values = in_heads(linear(normed, layer.values), weights.key_heads)
        mask = torch.ones(length, total, dtype=torch.bool, device=text.device).tril(total - length)
        attended = scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)
        return finish(layer, text, attended, weights.eps, eager_norm)

    def _retrieve(self, index: int, normed: Tensor) -> Tensor:
        """``[K0, d]``, oldest first."""
        keys, rows = self.keys[index], self.long_term[index]
        queries = self.project(index, normed)[0]
        scores = torch.sigmoid(queries @ keys.to(queries.device).T).mean(0)
        best = torch.topk(scores, min(self.retrieved_tokens, len(rows))).indices
        best = best.to(rows.device).sort().values
        ordered = best[self.births[best].argsort(stable=True)]
        return rows[ordered].to(normed.device)
