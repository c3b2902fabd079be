"""The published decoder of LaMemo, a Transformer-XL whose memory looks ahead: what golden traces are replayed with.

It is no decoder of transformers and takes no part in the mechanism; what is judged by it are the functions that the
mechanism shares: ``attended``, ``merged`` and ``lookahead_keys``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from attrs import define
from torch import Tensor
from torch.nn import functional

from mplus_lamemo.attention import Attention, attended, causal, lookahead_keys, looks_ahead, merged, weights

EPSILON = 1e-6


@define(frozen=True, eq=False)
class Carried:
    """The memory of a batch, empty at first.

    Attributes:
        embeddings: ``[B, m, d]``, scaled token embeddings of the newest m tokens.
        attention: per layer, of their places.
    """

    embeddings: Tensor
    attention: tuple[Attention, ...] = ()

    def __len__(self) -> int:
        return self.embeddings.shape[1]


@define(frozen=True, eq=False)
class LayerResult:
    """What one layer made of memory and text.

    Attributes:
        text: ``[B, q, d]``, its output for the text.
        memory: ``[B, m, d]``, the same for memory.
        text_weights: ``[B, H, q, m + q]``.
        ahead_weights: ``[B, H, m, w]``; None where there is no memory.
        alpha: ``[B, H, m]``, the weight of what was carried; None likewise.
        attention: of memory and text, to be carried.
    """

    text: Tensor
    memory: Tensor
    text_weights: Tensor
    ahead_weights: Tensor | None
    alpha: Tensor | None
    attention: Attention


@define(frozen=True, eq=False)
class PublishedDecoder:
    """The decoder by its weights, under their published names.

    Attributes:
        sizes: ``config.json`` of a case.
        named: weights.
    """

    sizes: Mapping[str, Any]
    named: Mapping[str, Tensor]

    def empty(self, batch: int) -> Carried:
        """Return a memory without anything."""
        return Carried(self.named["r_w_bias"].new_empty(batch, 0, self.sizes["d_model"]))

    def segment(self, ids: Tensor, before: Carried) -> tuple[list[LayerResult], Carried]:
        """Run one segment ``[B, q]``; return what each layer made of it, and the memory after it, detached."""
        embedded = self._embed(ids)
        memory, text, results = before.embeddings, embedded, list[LayerResult]()
        for layer in range(self.sizes["n_layer"]):
            carried = before.attention[layer] if len(before) else None
            results.append(self._layer(layer, memory, text, carried))
            memory, text = results[-1].memory, results[-1].text
        most = self.sizes["mem_len"]
        kept = torch.cat([before.embeddings, embedded], 1)[:, -most:].detach()
        return results, Carried(kept, tuple(one.attention.newest(most).detach() for one in results))

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits ``[B, q, V]`` of the last layer's output for the text."""
        if "crit.out_projs.0" in self.named:
            hidden = hidden @ self.named["crit.out_projs.0"]
        return hidden @ self.named["word_emb.emb_layers.0.weight"].T + self.named["crit.out_layers.0.bias"]

    def _embed(self, ids: Tensor) -> Tensor:
        found = self.named["word_emb.emb_layers.0.weight"][ids]
        if "word_emb.emb_projs.0" in self.named:
            found = found @ self.named["word_emb.emb_projs.0"].T
        scaled: Tensor = found * self.sizes["d_model"] ** 0.5
        return scaled

    def _layer(self, layer: int, memory: Tensor, text: Tensor, carried: Attention | None) -> LayerResult:
        prefix, pre = f"layers.{layer}.dec_attn.", self.sizes["pre_lnorm"]
        m, whole = memory.shape[1], torch.cat([memory, text], 1)
        normed = self._norm(f"{prefix}layer_norm", whole) if pre else whole
        queries = self._heads(normed @ self.named[f"{prefix}q_net.weight"].T)
        keys, values = map(self._heads, (normed @ self.named[f"{prefix}kv_net.weight"].T).chunk(2, -1))
        scores = self._scores(prefix, queries[:, :, m:], keys, "r_r_bias", torch.arange(m, keys.shape[2]))
        visible = causal(m, keys.shape[2])
        own = attended(scores, values, visible)
        ahead_weights = alpha = None
        if carried is not None:
            first, behind = lookahead_keys(m, keys.shape[2], text.shape[1])
            ahead = self._scores(
                prefix, queries[:, :, :m], keys[:, :, first:behind], "r_r_bias_future", torch.arange(m), first
            )
            sees = looks_ahead(m, first, behind)
            ahead_weights = weights(ahead, sees)[0]
            found, alpha = merged(carried, attended(ahead, values[:, :, first:behind], sees), EPSILON)
            own = Attention.cat([found, own])
        out = own.vectors.transpose(1, 2).flatten(2) @ self.named[f"{prefix}o_net.weight"].T + whole
        out = self._feed_forward(layer, out if pre else self._norm(f"{prefix}layer_norm", out))
        return LayerResult(out[:, m:], out[:, :m], weights(scores, visible)[0], ahead_weights, alpha, own)

    def _scores(self, prefix: str, queries: Tensor, keys: Tensor, bias: str, places: Tensor, first: int = 0) -> Tensor:
        """Return ``[B, H, n, S]`` of queries at ``places`` and keys from place ``first`` on, by distance."""
        distance = (places[:, None] - (first + torch.arange(keys.shape[2]))[None]).abs()
        content = (queries + self.named["r_w_bias"][:, None]) @ keys.mT
        table = self._relative(prefix, int(distance.max()) + 1)  # [H, distances, d_head]
        by_distance = (queries + self.named[bias][:, None]) @ table.mT
        far = distance.expand(*content.shape[:2], -1, -1)
        scaled: Tensor = (content + by_distance.gather(-1, far)) / self.sizes["d_head"] ** 0.5
        return scaled

    def _relative(self, prefix: str, count: int) -> Tensor:
        clamp = self.sizes["clamp_len"]
        distances = torch.arange(count).clamp(max=clamp) if clamp > 0 else torch.arange(count)
        size, like = self.sizes["d_model"], self.named["r_w_bias"]
        frequencies = 10000.0 ** (-torch.arange(0, size, 2).double() / size)
        angles = distances.double()[:, None] * frequencies
        sinusoid = torch.cat([angles.sin(), angles.cos()], -1).to(like)
        return self._heads((sinusoid @ self.named[f"{prefix}r_net.weight"].T)[None])[0]

    def _feed_forward(self, layer: int, hidden: Tensor) -> Tensor:
        prefix, pre = f"layers.{layer}.pos_ff.", self.sizes["pre_lnorm"]
        inner = self._norm(f"{prefix}layer_norm", hidden) if pre else hidden
        for number, name in enumerate(("CoreNet.0", "CoreNet.3")):
            inner = functional.linear(inner, self.named[f"{prefix}{name}.weight"], self.named[f"{prefix}{name}.bias"])
            inner = inner.relu() if not number else inner
        return hidden + inner if pre else self._norm(f"{prefix}layer_norm", hidden + inner)

    def _norm(self, name: str, hidden: Tensor) -> Tensor:
        return functional.layer_norm(
            hidden, hidden.shape[-1:], self.named[f"{name}.weight"], self.named[f"{name}.bias"]
        )

    def _heads(self, wide: Tensor) -> Tensor:
        """Return ``[B, n, H d_head]`` as ``[B, H, n, d_head]``."""
        return torch.unflatten(wide, -1, (self.sizes["n_head"], self.sizes["d_head"])).transpose(1, 2)
