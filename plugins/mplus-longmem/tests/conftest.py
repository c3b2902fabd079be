"""Tiny decoders, random, and one of them wrapped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

import mplus

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "eos_token_id": None,
}
Wrap = Callable[..., Any]


def decoder(kind: str, seed: int = 0) -> Any:
    """A Llama of five layers with grouped key heads, or an OPT of four, in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "opt":
            config = OPTConfig(**SIZES, ffn_dim=48, num_hidden_layers=4, word_embed_proj_dim=32, dropout=0.0)
            return OPTForCausalLM(config).double().eval()
        grouped = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 48, "num_hidden_layers": 5}
        return LlamaForCausalLM(LlamaConfig(**grouped)).double().eval()


@pytest.fixture(scope="session")
def wrap() -> Wrap:
    """``wrap(kind, seed, fields of the config, **options of longmem)``."""

    def wrapped(kind: str = "llama", seed: int = 0, sizes: Any = None, **options: Any) -> Any:
        fields = {"chunk_tokens": 16, "retrieved_tokens": 3, **(sizes or {})}
        table = {"mechanism": {"name": "longmem", **options}, **fields}
        return mplus.wrap(decoder(kind, seed), mplus.MPlusConfig.from_dict(table))

    return wrapped


@pytest.fixture(scope="session")
def model(wrap: Wrap) -> Any:
    """A Llama of five layers: two side layers, of which the second one reads."""
    return wrap()
