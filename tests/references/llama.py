"""Llama with a memory, written out in plain tensors: the check on the oracle itself.

Follows the definition literally: absolute positions ``0 .. P-1`` for the memory and ``P ..`` for the text, queries only
from the rows that a layer transforms, keys and values from all rows. Mistral is the same model with a sliding window.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel


class LlamaReference:
    """The weights and sizes of a transformers Llama or Mistral; nothing of its code runs.

    Args:
        model: where the weights come from.
        window: width of the sliding window among the rows that a layer transforms; None for full attention.
    """

    def __init__(self, model: PreTrainedModel, window: int | None = None) -> None:
        config = model.config
        self.weights = dict(model.state_dict())
        self.layers = config.num_hidden_layers
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.width = config.hidden_size // self.heads
        self.eps = config.rms_norm_eps
        self.theta = config.rope_parameters["rope_theta"]
        self.window = window

    def read(self, ids: Tensor, prefix_fn: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Logits ``[T, V]`` of ``ids`` ``[T]``; ``prefix_fn(layer, normed text [T, d])`` is the memory ``[P, d]``."""
        hidden = self.weights["model.embed_tokens.weight"][ids]
        for layer in range(self.layers):
            prefix = prefix_fn(layer, self._norm(hidden, f"model.layers.{layer}.input_layernorm"))
            hidden = self._layer(layer, torch.cat([prefix, hidden]), first_query=len(prefix))
        return self._norm(hidden, "model.norm") @ self.weights["lm_head.weight"].T

    def write(
        self, ids: Tensor, begin: Sequence[Tensor], context: Sequence[Tensor], *, mark: Tensor, k: int
    ) -> list[Tensor]:
        """New rows per layer for the chunk ``ids`` ``[n]``, by the arguments of the oracle's ``write``."""
        hidden = self.weights["model.embed_tokens.weight"][ids]
        n = len(hidden)
        new_rows = []
        for layer in range(self.layers):
            drawn_in = min(max(k - n, 0), len(context[layer]))
            new = min(k, n + drawn_in)
            rows = torch.cat([begin[layer], context[layer], hidden])
            rows[-new:] = rows[-new:] + mark
            output = self._layer(layer, rows, first_query=len(rows) - n - drawn_in)
            new_rows.append(output[-new:])
            hidden = output[-n:]
        return new_rows

    def _layer(self, layer: int, rows: Tensor, first_query: int) -> Tensor:
        """Outputs of the rows from ``first_query`` on."""
        name = f"model.layers.{layer}"
        normed = self._norm(rows, f"{name}.input_layernorm")
        hidden = rows[first_query:] + self._attention(f"{name}.self_attn", normed, first_query)
        normed = self._norm(hidden, f"{name}.post_attention_layernorm")
        gate = torch.nn.functional.silu(self._project(normed, f"{name}.mlp.gate_proj"))
        return hidden + self._project(gate * self._project(normed, f"{name}.mlp.up_proj"), f"{name}.mlp.down_proj")

    def _attention(self, name: str, normed: Tensor, first_query: int) -> Tensor:
        queries = self._rotate(self._project(normed, f"{name}.q_proj").view(-1, self.heads, self.width))[first_query:]
        keys = self._rotate(self._project(normed, f"{name}.k_proj").view(-1, self.groups, self.width))
        values = self._project(normed, f"{name}.v_proj").view(-1, self.groups, self.width)
        position = torch.arange(len(normed))
        distance = position[first_query:, None] - position
        visible = distance >= 0
        if self.window is not None:
            visible &= (distance < self.window) | (position < first_query)
        heads = []
        for head in range(self.heads):
            group = head * self.groups // self.heads
            scores = queries[:, head] @ keys[:, group].T * self.width**-0.5
            heads.append(scores.masked_fill(~visible, -torch.inf).softmax(-1) @ values[:, group])
        return self._project(torch.cat(heads, dim=-1), f"{name}.o_proj")

    def _rotate(self, x: Tensor) -> Tensor:
        """Rotate ``[rows, heads, width]`` by the row numbers; channel ``i`` pairs with channel ``i + width / 2``."""
        half = self.width // 2
        frequency = self.theta ** (-torch.arange(half) / half)
        angle = torch.arange(len(x))[:, None, None] * frequency
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weights[f"{name}.weight"]

    def _project(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T
