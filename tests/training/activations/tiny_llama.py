"""A Llama of a few tiny layers, and the gradients that it gets with its activations held in some way."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mplus.training import manage_activations

HIDDEN, HEADS, KV_HEADS, FFN, BATCH, TOKENS = 16, 2, 1, 24, 2, 12
WAYS: list[tuple[str, float | None]] = [("recompute", None), ("swap", None), ("memo", 0), ("memo", 0.5), ("memo", 1)]


def build(layers: int = 4, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": layers, "vocab_size": 32}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **fields})).to(dtype).train()


def ids(batch: int = BATCH, tokens: int = TOKENS) -> torch.Tensor:
    return torch.randint(2, 32, (batch, tokens), generator=torch.Generator().manual_seed(1))


def gradients(model: Any, way: str, share: float | None = None, **settings: Any) -> tuple[dict[str, Any], Any, Any]:
    """Return gradients by name, the counter's (device, host) between forward and backward, and the counter."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(2)
    with manage_activations(model, way, swapped_share=share, **settings) as counter:
        loss = model(input_ids=settings.pop("ids", ids()), labels=ids()).loss
    held = counter.device, counter.host
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, held, counter


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def layer_numbers() -> tuple[int, int, int]:
    """Return, per token, what a Llama layer of transformers saves: its input, what attention saves, the rest.

    MEMO's rule gives input, q, k, v, output of attention, residual, and four of the MLP. The norms save besides what
    they return the numbers before their weight, and a root each; attention saves the logarithm of its sum.
    """
    kv = HIDDEN * KV_HEADS // HEADS
    norm = 2 * HIDDEN + 1
    return HIDDEN, HIDDEN + HEADS, norm + HIDDEN + 2 * kv + HIDDEN + norm + 4 * FFN
