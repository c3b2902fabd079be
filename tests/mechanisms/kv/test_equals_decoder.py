"""With all chunks written behind each other and all brought back, a read is the decoder reading the whole text."""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING, Any

import pytest
import torch

import mplus
from benchmarks.quality.architectures.comparisons import error
from benchmarks.quality.architectures.decoders import BY_NAME, HYBRIDS, PURE, REFUSED, Architecture
from mplus.errors import NotSupported
from mplus.hf.pretrained.shipped import load_decoder, load_recall
from mplus.testing.rounding import InFloat64, allowed
from tests.helpers import noise
from tests.helpers.architectures import every, every_variant
from tests.mechanisms.kv.memories import CAPACITY, CHUNK, EVERY, logits, text, whole, wrapped

if TYPE_CHECKING:
    from torch import Tensor

LENGTH_DEPENDS = "rotary frequencies depend on the length of what is read"
BY_ITSELF = "the decoder computes attention by itself"
UNKNOWN_TURN = "turns its keys in a way that is not known"
NOT_KEPT = {
    "deepseek-v3": UNKNOWN_TURN,
    "hunyuan": UNKNOWN_TURN,
    **dict.fromkeys(("falcon-new", "falcon-multi-query", "bloom", "diffllama", "gptj", "codegen"), BY_ITSELF),
    **dict.fromkeys(("phi3-longrope", "llama-dynamic"), LENGTH_DEPENDS),
}
"""Decoders that can carry other memories, and why not this one."""
APPROXIMATE = tuple(architecture.name for architecture in HYBRIDS)
"""Their layers without attention see the text alone, and not what was read before it."""
EXACT = [architecture for architecture in PURE if architecture.name not in NOT_KEPT]
PROMPT = 9


@functools.cache
def decoder_of(name: str, implementation: str) -> Any:
    """Built once: nothing a test does changes the weights."""
    return wrapped(name, implementation, context_chunks=None, retrieved_tokens=CAPACITY)


@every_variant(EXACT)
def test_it_equals_the_decoder_reading_the_text(architecture: Architecture, implementation: str) -> None:
    model, plain = decoder_of(architecture.name, implementation), architecture.build(0, implementation)
    told, prompt = text(3 * CHUNK + 3), text(PROMPT, 1)[None]
    memory = model.new_memory()
    memory.write(told)
    assert len(memory.states[0].chunk_length) > 1
    with torch.no_grad():
        wanted = plain(whole(told, prompt[0])).logits[:, -PROMPT:]
    assert error(logits(model, prompt, memory), wanted) <= noise.rounding(architecture.name)
    assert error(logits(model, prompt), wanted) >= 0.5, "memory must matter for the comparison to mean anything"


@every(EXACT, representative=True)
def test_it_generates_what_the_decoder_generates_behind_the_text(architecture: Architecture) -> None:
    implementation = architecture.implementations[-1]
    model, plain = decoder_of(architecture.name, implementation), architecture.build(0, implementation)
    told, prompt = text(3 * CHUNK + 3), text(PROMPT, 1)[None]
    memory = model.new_memory()
    memory.write(told)
    for options in ({}, {"num_beams": 3}):
        made = model.generate(prompt, memory=memory, max_new_tokens=6, **options)
        behind = whole(told, prompt[0])
        wanted = plain.generate(behind, max_new_tokens=6, **options)
        assert made[0, PROMPT:].tolist() == wanted[0, behind.shape[1] :].tolist()


@every(HYBRIDS)
def test_hybrids_are_approximate(architecture: Architecture) -> None:
    implementation = architecture.implementations[-1]
    model, plain = decoder_of(architecture.name, implementation), architecture.build(0, implementation)
    told, prompt = text(3 * CHUNK), text(PROMPT, 1)[None]
    memory = model.new_memory()
    memory.write(told)
    with torch.no_grad():
        wanted = plain(whole(told, prompt[0])).logits[:, -PROMPT:]
    assert architecture.name in APPROXIMATE
    assert error(logits(model, prompt, memory), logits(model, prompt)) >= 0.5
    assert error(logits(model, prompt, memory), wanted) >= 0.5


@every([*(BY_NAME[name] for name in NOT_KEPT), *REFUSED])
def test_decoders_whose_keys_cannot_be_kept_are_refused_by_name_and_left_alone(architecture: Architecture) -> None:
    model = architecture.build()
    before = type(model), list(model.state_dict())
    with pytest.raises(NotSupported, match=NOT_KEPT.get(architecture.name, type(model).__name__)) as raised:
        mplus.wrap(model, {"mechanism": "kv", "chunk_tokens": 8})
    assert type(model).__name__ in str(raised.value)
    assert (type(model), list(model.state_dict())) == before


def test_attention_that_changes_what_is_cached_is_refused_without_a_check_too() -> None:
    message = "DiffLlamaAttention of layer 0 changes keys and values between its cache and attention"
    with pytest.raises(NotSupported, match=message):
        mplus.wrap(BY_NAME["diffllama"].build(), {"mechanism": "kv"}, check=False)


def test_every_architecture_is_exact_approximate_or_refused() -> None:
    assert {a.name for a in EXACT} | NOT_KEPT.keys() | set(APPROXIMATE) == {a.name for a in (*PURE, *HYBRIDS)}


def shipped(name: str) -> Any:
    """A trained decoder without memory."""
    return load_decoder() if name == "stories260K" else mplus.unwrap(load_recall()[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["stories260K", "recall-tiny"])
def test_trained_decoders_read_it_as_text(name: str, dtype: torch.dtype) -> None:
    plain = shipped(name)
    exact, plain = copy.deepcopy(plain).double(), plain.to(dtype)
    ids = _continued(exact, 120)
    sizes = {"chunk_tokens": 32, "min_chunk_tokens": 1, "retrieved_tokens": 96}
    model = mplus.wrap(copy.deepcopy(plain), {"mechanism": {"name": "kv", "context_chunks": None, **EVERY}, **sizes})
    first = model.mplus_engine.decoder.shape.first_token
    told, prompt = ids[0, 1:97], ids[:, 97:]  # no chunk stands in the prompt, which is shorter
    memory = model.new_memory()
    memory.write(told)
    behind = torch.cat([torch.tensor([first]), told, prompt[0]])[None]
    with torch.no_grad():
        as_text = plain(behind).logits[:, -prompt.shape[1] :]
        with InFloat64():
            wanted = exact(behind).logits[:, -prompt.shape[1] :]
    assert error(logits(model, prompt, memory).double(), wanted) <= allowed(as_text, wanted)


@torch.no_grad()
def _continued(model: Any, tokens: int) -> Tensor:
    """``[1, tokens]``: what the decoder says by itself."""
    first = torch.tensor([[model.config.bos_token_id or 1]])
    found: Tensor = model.generate(first, max_new_tokens=tokens - 1, min_new_tokens=tokens - 1, do_sample=False)
    return found
