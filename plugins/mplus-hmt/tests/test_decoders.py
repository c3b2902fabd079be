"""HMT on decoders of many kinds: what is read is ``[P ; sensory ; text]`` as embeddings."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mplus
from benchmarks.quality.architectures.decoders import BY_NAME

K = 3
OFTEN = ("gpt2", "gemma3", "falcon-new", "bloom")
NIGHTLY = (
    *("opt", "smollm3", "llama-dynamic", "mistral-sliding", "qwen2", "qwen3", "gemma2", "phi3", "phi", "gpt-neox"),
    *("olmo2", "granite", "cohere2", "gpt-oss", "deepseek-v3", "gptj", "hunyuan"),
)
FIELDS: dict[str, dict[str, Any]] = {"bloom": {"memory_positions": "sequential"}}
"""Of the configuration, beyond the usual ones: with ALiBi memory would sit at one position."""
ROUNDED = 1e-5
"""Of the standard deviation of logits, in float32: ten times what was seen."""


def text(seed: int, tokens: int) -> torch.Tensor:
    return torch.randint(3, 101, (tokens,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", [*OFTEN, *(pytest.param(name, marks=pytest.mark.nightly) for name in NIGHTLY)])
@torch.no_grad()
def test_a_read_is_that_of_embeddings(name: str) -> None:
    torch.manual_seed(0)
    fields: dict[str, Any] = {"mechanism": {"name": "hmt", "sensory_tokens": K}, "chunk_tokens": 10}
    model = mplus.wrap(BY_NAME[name].build(), mplus.MPlusConfig(**fields, **FIELDS.get(name, {})))
    memory, ids = model.new_memory(), text(3, 4)[None]
    for seed in (1, 2):
        memory.write(text(seed, 6))
    decoder, views = model.mplus_engine.decoder, memory.streams.versioned_snapshot()[1]
    embedded = decoder.embed(ids)
    prompt = model.mplus_engine.mechanism.recalled(decoder, views, embedded, adapter="read").prompt
    whole = torch.cat([prompt, decoder.embed(text(2, 6)[None, -K:]), embedded], 1)
    expected = model(inputs_embeds=whole).logits[:, 1 + K :]
    assert (model(ids, memory=memory).logits - expected).abs().max() <= ROUNDED * expected.std()
