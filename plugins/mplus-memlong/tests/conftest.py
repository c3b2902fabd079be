"""A small decoder with grouped key heads, shared by the tests that need no trained weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mplus
from mplus.config import MPlusConfig

SIZES = {"chunk_tokens": 8, "retrieved_tokens": 8, "long_term_tokens": 64, "adapters": False}
Wrap = Callable[..., Any]


def tiny(heads: int = 4, key_heads: int = 2) -> LlamaForCausalLM:
    """Four layers of width 32, random."""
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=128,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return LlamaForCausalLM(config).double().eval()


@pytest.fixture(scope="session")
def decoder() -> LlamaForCausalLM:
    return tiny()


@pytest.fixture
def wrap(decoder: LlamaForCausalLM) -> Iterator[Wrap]:
    """Wrap the decoder anew, with options of the mechanism, and fields of the config under ``config``."""

    def wrapped(model: Any = decoder, check: bool = False, config: dict[str, Any] | None = None, **options: Any) -> Any:
        if hasattr(model, "mplus_engine"):
            mplus.unwrap(model)
        mechanism = {"name": "memlong", "memory_layer": 1, "group_tokens": 4, **options}
        return mplus.wrap(
            model, MPlusConfig.from_dict({**SIZES, "mechanism": mechanism, **(config or {})}), check=check
        )

    yield wrapped
    if hasattr(decoder, "mplus_engine"):
        mplus.unwrap(decoder)


@pytest.fixture
def ids() -> Callable[..., torch.Tensor]:
    """Ids ``[n]``, equal for equal seeds."""
    return lambda seed, tokens=8: torch.randint(3, 97, (tokens,), generator=torch.Generator().manual_seed(seed))


@contextmanager
def nothing() -> Iterator[None]:
    yield
