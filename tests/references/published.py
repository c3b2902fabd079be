"""The published models written out flat over their state dict: what a loaded checkpoint must compute.

Nothing of mplus or transformers runs here. Rows are laid out from position 0 on; a layer gives keys and values to all
of them and outputs to those from ``first`` on.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

WRITE, READ = "default", "decoder_adapter"


class PublishedReference:
    """A published M+ or MemoryLLM checkpoint.

    Args:
        config: ``config.json`` as plain data.
        tensors: state dict; converted to float64.
        frequency_dtype: what rotary frequencies are rounded to, or None.
    """

    def __init__(
        self, config: dict[str, Any], tensors: dict[str, Tensor], frequency_dtype: torch.dtype | None = None
    ) -> None:
        self.config = config
        self.tensors = {name: tensor.double() for name, tensor in tensors.items()}
        self.layers, self.k = config["num_hidden_layers"], config["num_tokens"]
        self.heads, self.groups = config["num_attention_heads"], config["num_key_value_heads"]
        self.width = config["hidden_size"] // self.heads
        self.scale = config["lora_config"]["lora_alpha"] / config["lora_config"]["r"]
        self.read_adapter = READ if config["add_decoder_lora"] else WRITE
        self.retrieved = self.k * config.get("num_ltm_blocks", 0)
        self.frequencies = self._frequencies()
        if frequency_dtype is not None:
            self.frequencies = self.frequencies.to(frequency_dtype).to(torch.float32)

    def read(self, ids: Tensor) -> Tensor:
        """Logits ``[n, V]`` of ``ids`` ``[n]`` with all of the memory in front."""
        hidden = self.tensors["model.embed_tokens.weight"][ids]
        for layer in range(self.layers):
            rows = torch.cat([*self._prefix(layer, hidden), hidden])
            hidden = self._layer(layer, rows, len(rows) - len(ids), self.read_adapter)
        return self._norm(hidden, "model.norm") @ self.tensors["lm_head.weight"].T

    def _prefix(self, layer: int, hidden: Tensor) -> list[Tensor]:
        if "initialized" in self.tensors and not self.tensors["initialized"]:
            return []
        long_term = [self.tensors[f"ltm.{layer}"][self.retrieve(layer, hidden)]] if self.retrieved else []
        return [self.tensors["bos_embedding"][layer], *long_term, self.tensors["memory"][layer]]

    def write(self, ids: Tensor) -> Tensor:
        """``[L, K, d]`` new rows for the chunk ``ids`` ``[n]``."""
        hidden, block = self.tensors["model.embed_tokens.weight"][ids], []
        for layer in range(self.layers):
            rows = torch.cat([self.tensors["bos_embedding"][layer], self.tensors["memory"][layer][-self.k :], hidden])
            rows[-self.k :] += self.tensors["new_memory_positional_emb"][0, 0]
            output = self._layer(layer, rows, len(rows) - max(len(ids), self.k), WRITE)
            block.append(output[-self.k :])
            hidden = output[-len(ids) :]
        return torch.stack(block)

    def retrieve(self, layer: int, hidden: Tensor) -> list[int]:
        """Rows of long-term memory for the text ``hidden`` ``[n, d]``, oldest first, later rows first among equals."""
        ages = self.tensors[f"ltm_ages.{layer}"].trunc().tolist()
        if len(ages) < self.retrieved:
            listed = list(range(len(ages))) * math.ceil(self.retrieved / len(ages))
            places = range(len(listed) - self.retrieved, len(listed))
            return [listed[place] for place in sorted(places, key=lambda place: (-ages[listed[place]], -place))]
        queries = self._project_flat(layer, "query_proj", self._norm(hidden, f"model.layers.{layer}.input_layernorm"))
        scores = (queries @ self.tensors[f"ltm_keys.{layer}"].T).sigmoid().mean(0)
        best = scores.topk(self.retrieved).indices.tolist()
        return sorted(best, key=lambda row: (-ages[row], -row))

    def _project_flat(self, layer: int, name: str, x: Tensor) -> Tensor:
        path = f"model.layers.{layer}.self_attn.{name}"
        if self.config["num_selector_layers"] == 1:
            return x @ self.tensors[f"{path}.weight"].T
        return silu(x @ self.tensors[f"{path}.0.weight"].T) @ self.tensors[f"{path}.2.weight"].T

    def _layer(self, layer: int, rows: Tensor, first: int, adapter: str) -> Tensor:
        path = f"model.layers.{layer}"
        normed = self._norm(rows, f"{path}.input_layernorm")
        hidden = rows[first:] + self._attention(f"{path}.self_attn", normed, first, adapter)
        normed = self._norm(hidden, f"{path}.post_attention_layernorm")
        gate = silu(self._linear(normed, f"{path}.mlp.gate_proj", adapter))
        up = self._linear(normed, f"{path}.mlp.up_proj", adapter)
        return hidden + self._linear(gate * up, f"{path}.mlp.down_proj", adapter)

    def _attention(self, path: str, normed: Tensor, first: int, adapter: str) -> Tensor:
        total = len(normed)
        queries = self._rotate(self._linear(normed, f"{path}.q_proj", adapter).view(total, self.heads, -1))
        keys = self._rotate(self._linear(normed, f"{path}.k_proj", adapter).view(total, self.groups, -1))
        values = self._linear(normed, f"{path}.v_proj", adapter).view(total, self.groups, -1)
        hidden_from = torch.ones(total, total, dtype=torch.bool).triu(1)[first:]
        heads = []
        for head in range(self.heads):
            group = head // (self.heads // self.groups)
            scores = queries[first:, head] @ keys[:, group].T / math.sqrt(self.width)
            heads.append(scores.masked_fill(hidden_from, -torch.inf).softmax(-1) @ values[:, group])
        return self._linear(torch.cat(heads, -1), f"{path}.o_proj", adapter)

    def _linear(self, x: Tensor, path: str, adapter: str) -> Tensor:
        if f"{path}.weight" in self.tensors:
            return x @ self.tensors[f"{path}.weight"].T
        low = x @ self.tensors[f"{path}.lora_A.{adapter}.weight"].T @ self.tensors[f"{path}.lora_B.{adapter}.weight"].T
        return x @ self.tensors[f"{path}.base_layer.weight"].T + low * self.scale

    def _norm(self, x: Tensor, path: str) -> Tensor:
        return (
            x
            * (x.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"]).rsqrt()
            * self.tensors[f"{path}.weight"]
        )

    def _rotate(self, x: Tensor) -> Tensor:
        # Angles in float32, as everywhere: at large positions their rounding is larger than that of anything else.
        angle = torch.arange(len(x), dtype=torch.float32)[:, None, None] * self.frequencies
        a, b = x.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def _frequencies(self) -> Tensor:
        frequencies = self.config["rope_theta"] ** (-torch.arange(0, self.width, 2, dtype=torch.float32) / self.width)
        scaling = self.config.get("rope_scaling")
        if scaling is None:
            return frequencies
        original = scaling["original_max_position_embeddings"]
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = original * frequencies / (2 * math.pi)
        blend = ((turns - low) / (high - low)).clamp(0, 1)  # 1: kept, 0: slowed down by the factor
        return frequencies * (blend + (1 - blend) / scaling["factor"])
