"""A small decoder with two adapters of a user's, and ways of changing what projects its memory rows."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mplus

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mplus.memory import Memory

SIZES: dict[str, Any] = {
    "chunk_tokens": 32,
    "memory_tokens_per_chunk": 8,
    "short_term_tokens": 24,
    "retrieved_tokens": 8,
    "long_term_tokens": 500,
    "retriever": {"name": "linear", "width": 8},
    "adapters": {"rank": 2},
}
TEXT = torch.randint(2, 500, (400,), generator=torch.Generator().manual_seed(3))
ASKED = torch.arange(2, 12)[None]
QKV = ["q_proj", "k_proj", "v_proj"]


def decoder() -> Any:
    """Grouped key heads, as in Llama 3: keys and values are smaller than hidden states."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=2, initializer_range=0.05)
    return LlamaForCausalLM(config).eval()


def lora(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "target_modules": QKV, "task_type": "CAUSAL_LM", **options})


@torch.no_grad()
def moved(model: Any, seed: int = 1) -> Any:
    """Every adapter does something, ours too."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def with_two(base: Any = None) -> Any:
    model = peft.get_peft_model(decoder() if base is None else base, lora(), adapter_name="anna")
    model.add_adapter("bert", lora())
    return model.eval()


def wrapped(model: Any = None, **changes: Any) -> Any:
    config = mplus.MPlusConfig.from_dict({**SIZES, **changes})
    return moved(mplus.wrap(with_two() if model is None else model, config, check=False))


def written(model: Any, rows: str, **options: Any) -> Memory:
    memory: Memory = model.new_memory(memory_rows=rows, **options)
    memory.write(TEXT)
    return memory


@torch.no_grad()
def logits(model: Any, memory: Memory, **options: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=ASKED.expand(memory.batch_size, -1), memory=memory, **options).logits
    return found


@contextlib.contextmanager
def alone(model: Any, name: str) -> Iterator[None]:
    if name == "__base__":
        with model.disable_adapter():
            yield
    else:
        model.set_adapter(name)
        yield


@contextlib.contextmanager
def switched(model: Any) -> Iterator[None]:
    model.set_adapter("bert")
    yield
    model.set_adapter("anna")


@contextlib.contextmanager
def edited(model: Any, part: str, scale: float = -1.0) -> Iterator[None]:
    """Through ``data``: PyTorch counts no change."""
    weight = next(parameter for name, parameter in model.named_parameters() if part in name)
    before = weight.data.clone()
    weight.data.mul_(scale)
    yield
    weight.data.copy_(before)
