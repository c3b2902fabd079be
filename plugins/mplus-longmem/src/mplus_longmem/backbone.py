"""The decoder that LongMem was published with, for transformers: parallel blocks and ALiBi.

There is no such class in transformers: ``x + attention(norm(x)) + feed_forward(norm(x))`` with one norm, scores
``q k / sqrt(d) + slope_h j`` where j counts the real tokens in front of a key, and a head with a bias that is not tied
to the embedding. Written for the traces; with other weights it works as any decoder does.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class BackboneConfig(PreTrainedConfig):
    """Sizes: ``vocab_size``, ``hidden_size``, ``num_hidden_layers``, ``num_attention_heads``, ``layer_norm_eps``."""

    model_type = "longmem_backbone"

    vocab_size: int = 50265
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    layer_norm_eps: float = 1e-6


class BackboneAttention(nn.Module):
    """Attention without biases; distances come with the mask."""

    def __init__(self, config: BackboneConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer, True
        self.head_dim = config.hidden_size // config.num_attention_heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            self.add_module(name, nn.Linear(config.hidden_size, config.hidden_size, bias=False))

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, past_key_values: Cache | None = None, **kwargs: Any
    ) -> Tensor:
        queries, keys, values = (
            cast("nn.Linear", getattr(self, name))(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, _attention)  # noqa: SLF001
        found, _ = attend(self, queries, keys, values, attention_mask, scaling=self.head_dim**-0.5, **kwargs)
        made: Tensor = cast("nn.Linear", self.out_proj)(found.flatten(2))
        return made


class BackboneLayer(nn.Module):
    """``x + attention(norm(x)) + feed_forward(norm(x))``.

    Attributes:
        approximate: of GELU: "tanh" in the decoder; "none" in the published side network.
    """

    approximate = "tanh"

    def __init__(self, config: BackboneConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = BackboneAttention(config, layer)
        self.fc_in = nn.Linear(config.hidden_size, 4 * config.hidden_size)
        self.fc_out = nn.Linear(4 * config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        inside = self.ln_1(hidden_states)
        widened = gelu(self.fc_in(inside), approximate=self.approximate)
        found: Tensor = hidden_states + self.attn(inside, **kwargs) + self.fc_out(widened)
        return found


class BackboneModel(PreTrainedModel):
    """The layers and the final norm."""

    config_class = BackboneConfig
    _supports_sdpa = True

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList(BackboneLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.ln_f = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Embedding:
        return self.wte

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        hidden = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        cache = DynamicCache() if use_cache and past_key_values is None else past_key_values
        before = 0 if cache is None else int(cache.get_seq_length())
        mask = self._mask(hidden, before, attention_mask)
        states = [hidden]
        for layer in self.h:
            hidden = layer(hidden, attention_mask=mask, past_key_values=cache)
            states.append(hidden)
        hidden = states[-1] = self.ln_f(hidden)
        shown = tuple(states) if output_hidden_states else None
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache, hidden_states=shown)

    def _mask(self, hidden: Tensor, before: int, attention_mask: Tensor | None) -> Tensor:
        """Return ``[B, H, T, S]``: slope of the head times place of the key; very low where that is not seen."""
        batch, tokens, total = hidden.shape[0], hidden.shape[1], before + hidden.shape[1]
        real = hidden.new_ones(batch, total, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        place = (real.cumsum(1) - 1).clamp(min=0).to(hidden)
        index = torch.arange(total, device=hidden.device)
        seen = (index <= index[before:, None]) & real[:, None]
        # A padding token sees itself, since a softmax over nothing is no number.
        seen = seen | (index == index[before:, None])
        bias = slopes(self.config.num_attention_heads).to(hidden)[:, None, None] * place[:, None, None]
        return bias.expand(-1, -1, tokens, -1).masked_fill(~seen[:, None], torch.finfo(hidden.dtype).min)


class BackboneForCausalLM(PreTrainedModel, GenerationMixin):
    """The decoder with its head."""

    config_class = BackboneConfig
    base_model_prefix = "transformer"
    _supports_sdpa = True

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__(config)
        self.transformer = BackboneModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Embedding:
        return self.transformer.wte

    def forward(
        self, input_ids: Tensor | None = None, labels: Tensor | None = None, **kwargs: Any
    ) -> CausalLMOutputWithPast:
        found = self.transformer(input_ids, **kwargs)
        logits = self.lm_head(found.last_hidden_state)
        loss = None if labels is None else self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=found.past_key_values, hidden_states=found.hidden_states
        )


def slopes(heads: int) -> Tensor:
    """Return ``[H]`` ALiBi slopes: ``2^(-8 (i + 1) / p)`` for the largest power of two p <= H, then those between."""
    power = 1 << (heads.bit_length() - 1)
    first = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    return torch.tensor(first + [2 ** (-8 * (2 * i + 1) / (2 * power)) for i in range(heads - power)])


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    weights = (query @ key.mT * scaling + mask).softmax(-1)
    return (weights @ value).transpose(1, 2), weights


eager_attention_forward = _attention
"""The name by which transformers' own decoders keep it in their files."""
