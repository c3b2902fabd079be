"""Decoders with random weights for measurements of speed, and a transformers cache that begins with a prefix."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from attrs import define
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

Model = TypeVar("Model", bound=nn.Module)


@define(frozen=True, eq=False)
class LayerWeights:
    """Weights of one decoder layer, as the modules of a Llama hold them."""

    norm: Tensor
    queries: Tensor
    keys: Tensor
    values: Tensor
    output: Tensor
    mlp_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


@define(frozen=True, eq=False)
class DecoderWeights:
    """Weights of a Llama, without its modules.

    Attributes:
        embedding, head: ``[V, d]``.
        layers: the weights of each layer.
        norm: ``[d]``, the norm before the head.
        frequencies: ``[D / 2]`` float32, of the rotary embedding.
        eps: the epsilon of the norms.
        heads, key_heads: H and Hkv.
    """

    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: Tensor
    frequencies: Tensor
    eps: float
    heads: int
    key_heads: int


def random_llama(fields: Mapping[str, Any], dtype: torch.dtype, device: torch.device, seed: int) -> LlamaForCausalLM:
    """Make a Llama with random weights, attention by ``sdpa``, in eval mode; its weights are made on ``device``."""
    before = torch.get_default_dtype()
    torch.manual_seed(seed)
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = LlamaForCausalLM(LlamaConfig(**fields))
    finally:
        torch.set_default_dtype(before)
    model.set_attn_implementation("sdpa")
    model.eval().requires_grad_(False)
    return model


def twin(model: Model) -> Model:
    """Copy the modules around the same tensors, so that one of the two can be wrapped."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def weights_of(model: LlamaForCausalLM) -> DecoderWeights:
    """Return the tensors of a Llama, wrapped or not."""
    layers = []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        layers.append(
            LayerWeights(
                norm=layer.input_layernorm.weight,
                queries=attention.q_proj.weight,
                keys=attention.k_proj.weight,
                values=attention.v_proj.weight,
                output=attention.o_proj.weight,
                mlp_norm=layer.post_attention_layernorm.weight,
                gate=mlp.gate_proj.weight,
                up=mlp.up_proj.weight,
                down=mlp.down_proj.weight,
            )
        )
    config = model.config
    return DecoderWeights(
        embedding=model.model.embed_tokens.weight,
        layers=tuple(layers),
        norm=model.model.norm.weight,
        head=model.lm_head.weight,
        frequencies=model.model.rotary_emb.inv_freq,
        eps=config.rms_norm_eps,
        heads=config.num_attention_heads,
        key_heads=config.num_key_value_heads or config.num_attention_heads,
    )


class PrefixedCache:
    """A ``DynamicCache`` whose first keys and values are given.

    Args:
        keys, values: per layer ``[B, Hkv, P, D]``.
    """

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        self._prefix = list(zip(keys, values, strict=True))
        self.cache = DynamicCache()
        for layer, (key, value) in enumerate(self._prefix):
            self.cache.update(key, value, layer)
        self.restore()

    def restore(self) -> None:
        """Drop all tokens read since; nothing is copied."""
        for layer, (key, value) in zip(self.cache.layers, self._prefix, strict=True):
            layer.keys, layer.values = key, value  # type: ignore[union-attr]
