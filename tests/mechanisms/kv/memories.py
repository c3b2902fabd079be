"""Wrapped tiny decoders with a memory of keys and values, and the same decoders left alone."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mplus
from benchmarks.quality.architectures.decoders import BOS, BY_NAME, VOCAB_SIZE
from mplus.hf.decoders.tokenizers import train_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

PLAIN = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
WITH_SYSTEM = "{% if messages[0].role != 'system' %}<|system|>\nBe kind.</s>\n{% endif %}" + PLAIN
CHUNK, RETRIEVED, CAPACITY = 8, 24, 40
EVERY = {"order": "written", "min_score": -1.0, "retrieved_chunks": None, "rerank": 0}
"""Options by which chunks come back in order of writing, whether or not they have to do with the text."""


def wrapped(architecture: str = "llama", implementation: str | None = None, **changes: Any) -> Any:
    """A decoder of the table of architectures; ``changes`` of the config, or options of the mechanism, ``EVERY``."""
    options: dict[str, Any] = dict(EVERY)
    options |= {
        name: changes.pop(name)
        for name in (
            "context_chunks",
            "begin",
            "opening",
            "closing",
            "order",
            "retrieved_chunks",
            "min_score",
            "rerank",
            "likelihood",
        )
        if name in changes
    }
    sizes = {"chunk_tokens": CHUNK, "min_chunk_tokens": 1, "retrieved_tokens": RETRIEVED, "long_term_tokens": CAPACITY}
    if options.get("context_chunks", 0) != 0:
        del sizes["long_term_tokens"]  # chunks must not outlive those they were written behind
    config = {**sizes, "mechanism": {"name": "kv", **options}, **changes}
    return mplus.wrap(BY_NAME[architecture].build(0, implementation), config)


def text(tokens: int, seed: int = 0) -> Tensor:
    """``[tokens]`` random ids."""
    return torch.randint(2, VOCAB_SIZE, (tokens,), generator=torch.Generator().manual_seed(seed))


def whole(*parts: Tensor) -> Tensor:
    """``[1, n]``: BOS, and behind it all parts."""
    return torch.cat([torch.tensor([BOS]), *parts])[None]


@torch.no_grad()
def logits(model: Any, ids: Tensor, memory: Any = None, **options: Any) -> Tensor:
    found: Tensor = model(ids, memory=memory, **options).logits
    return found


def tokenizer(template: str | None = WITH_SYSTEM) -> Any:
    """A byte-level tokenizer with a chat template."""
    found = _trained()
    found.chat_template = template
    return found


@functools.cache
def _trained() -> Any:
    return train_tokenizer(["The key is under the blue stone."], 280)


def decoder() -> Any:
    """A tiny Llama whose vocabulary holds that of ``tokenizer``."""
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()
