"""Decoders with memories of text that tests share: the small Llama that is shipped, and a tiny Mamba."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from transformers import MambaConfig, MambaForCausalLM, RwkvConfig, RwkvForCausalLM

import mplus
from mplus.hf.pretrained.shipped import load_decoder, load_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from mplus.memory import Memory

CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
KEY, CAT = "The key is under the blue stone.", "Lily has a cat in her house."


@functools.cache
def tokenizer() -> Any:
    """The tokenizer of the Llama, with a chat template."""
    found = load_tokenizer()
    found.chat_template = CHAT
    return found


@functools.cache
def llama() -> Any:
    """The shipped decoder in float64, left alone; whoever wraps it unwraps it."""
    return load_decoder().double()


def mamba(seed: int = 0) -> Any:
    """A Mamba of two layers with random weights, in float64; its vocabulary is that of the tokenizer."""
    config = MambaConfig(
        vocab_size=512,
        hidden_size=32,
        state_size=4,
        num_hidden_layers=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MambaForCausalLM(config).double().eval()


def rwkv() -> Any:
    """A RWKV of two layers with random weights, which sees padding."""
    config = RwkvConfig(
        vocab_size=512,
        hidden_size=32,
        attention_hidden_size=32,
        num_hidden_layers=2,
        context_length=128,
        bos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return RwkvForCausalLM(config).eval()


def wrapped(model: Any = None, mechanism: str = "notes", chunk_tokens: int | None = None, **options: Any) -> Any:
    """A new copy of the Llama, or ``model``, wrapped for a mechanism with these options."""
    decoder = load_decoder().double() if model is None else model
    return mplus.wrap(decoder, {"mechanism": {"name": mechanism, **options}, "chunk_tokens": chunk_tokens})


@functools.cache
def with_notes(**options: Any) -> Any:
    """The Llama wrapped for notes, shared between tests that change nothing of it."""
    return wrapped(**options)


def noted(model: Any, *texts: str, rows: int = 1) -> Memory:
    """A memory of these texts; sources are "s0", "s1", ..."""
    memory: Memory = model.new_memory(rows, tokenizer=tokenizer())
    for number, text in enumerate(texts):
        memory.write([text] * rows, source=f"s{number}")
    return memory


def ids_of(text: str, *, special: bool = True) -> list[int]:
    """Tokens of a text."""
    found: list[int] = tokenizer()(text, add_special_tokens=special)["input_ids"]
    return found


def prompt(text: str = "Where is the key?") -> Tensor:
    """``[1, T]`` ids of a prompt."""
    return torch.tensor([ids_of(text)])


def by_hand(front: str, ids: Tensor) -> Tensor:
    """``[1, w + T]``: a prompt ``[1, T]`` with a text behind its BOS."""
    return torch.cat([ids[:, :1], torch.tensor([ids_of(front, special=False)]), ids[:, 1:]], 1)


@torch.no_grad()
def logits(model: Any, ids: Tensor, memory: Any = None, **options: Any) -> Tensor:
    found: Tensor = model(ids, memory=memory, **options).logits
    return found


def continued(model: Any, ids: Tensor, memory: Any = None, **options: Any) -> Tensor:
    """Greedy decoding of 8 tokens."""
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **options}
    found: Tensor = model.generate(ids, memory=memory, **settings)
    return found
