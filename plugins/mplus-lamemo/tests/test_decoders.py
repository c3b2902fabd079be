"""LaMemo on decoders of many kinds: it is wrapped, written and read, or refused with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mplus
from benchmarks.quality.architectures.decoders import BY_NAME
from mplus.errors import NotSupported

READ = ("mistral-sliding", "gemma3", "phi")
MORE = ("smollm3", "qwen2", "qwen3", "gemma2", "phi3", "gpt-neox", "olmo2", "granite", "cohere2", "diffllama")
REFUSED = {"gpt-oss": "sinks", "deepseek-v3": "turned further", "gptj": "in its own way", "bloom": "rotary"}


def text(seed: int, tokens: int) -> torch.Tensor:
    return torch.randint(3, 101, (tokens,), generator=torch.Generator().manual_seed(seed))


def wrapped(name: str) -> Any:
    torch.manual_seed(0)
    config = mplus.MPlusConfig(mechanism="lamemo", chunk_tokens=6, short_term_tokens=9)
    return mplus.wrap(BY_NAME[name].build(), config)


@pytest.mark.parametrize("name", [*READ, *(pytest.param(name, marks=pytest.mark.nightly) for name in MORE)])
def test_the_window_is_read(name: str) -> None:
    """A first place, of which nothing is refreshed yet, is read as plain text in front would be."""
    model = wrapped(name)
    memory, ids = model.new_memory(), text(3, 4)[None]
    memory.write(text(1, 1))
    with torch.no_grad():
        found = model(ids, memory=memory).logits
        expected = model(torch.cat([text(1, 1)[None], ids], 1)).logits[:, 1:]
    assert (found - expected).abs().max() <= 1e-5 * expected.std()
    memory.write(text(2, 12))
    with torch.no_grad():
        assert bool(model(ids, memory=memory).logits.isfinite().all())


@pytest.mark.parametrize("name", REFUSED)
def test_others_are_refused(name: str) -> None:
    with pytest.raises(NotSupported, match=REFUSED[name]):
        wrapped(name)
