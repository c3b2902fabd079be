"""Every architecture, in every attention implementation, against the placeholder oracle or against itself."""

from __future__ import annotations

import functools

import pytest
import torch

import mplus
from benchmarks.quality.architectures import comparisons
from benchmarks.quality.architectures.comparisons import SEARCHES, WRITTEN
from benchmarks.quality.architectures.decoders import BY_NAME, HYBRIDS, PURE, REFUSED, Architecture
from benchmarks.quality.architectures.retrofitted import CHUNK, K, Pair, config_for, retrofit
from mplus.errors import NotSupported
from tests.helpers import noise
from tests.helpers.architectures import every, every_variant, every_variant_with

pytestmark = pytest.mark.two_computations

UNSTABLE = "a growing sequence changes the frequencies of keys already cached, with or without memory"


@functools.cache
def pair_of(name: str, implementation: str) -> Pair:
    """Built once: nothing a test does changes the weights."""
    return retrofit(BY_NAME[name], implementation)


@pytest.fixture
def pair(architecture: Architecture, implementation: str) -> Pair:
    found = pair_of(architecture.name, implementation)
    found.forget_longest_sequence()
    return found


@pytest.fixture(autouse=True)
def _no_gradients() -> object:
    with torch.no_grad():
        yield


def allowed(architecture: Architecture) -> float:
    return noise.rounding(architecture.name)


@every_variant((*PURE, *HYBRIDS))
def test_without_a_memory_the_logits_are_those_of_the_base_model(
    architecture: Architecture, implementation: str, pair: Pair
) -> None:
    ids = pair.text(20)
    plain = architecture.build(0, implementation)
    assert torch.equal(pair.wrapped(input_ids=ids).logits, plain(input_ids=ids).logits)


@every_variant()
def test_reading_the_stm_equals_the_oracle(architecture: Architecture, implementation: str, pair: Pair) -> None:
    found, moved = comparisons.stm_read(pair)
    assert found <= allowed(architecture)
    assert moved >= 1, "memory must matter for the comparison to mean anything"


@every_variant()
def test_reading_with_retrieval_equals_the_oracle(architecture: Architecture, implementation: str, pair: Pair) -> None:
    assert comparisons.retrieval_read(pair) <= allowed(architecture)


WRITES = [(tokens, chunks) for tokens in (CHUNK, K, K - 1, 1) for chunks in (0, 1, 3)]
"""Tokens of a chunk, and how many chunks were written before it."""


@every_variant_with("lengths", WRITES, always=[(CHUNK, 3), (1, 0)])
def test_writing_equals_the_oracle(
    architecture: Architecture, implementation: str, pair: Pair, lengths: tuple[int, int]
) -> None:
    assert comparisons.write(pair, *lengths) <= allowed(architecture)


@every_variant([a for a in (*PURE, *HYBRIDS) if a.stable_cache])
def test_prefill_and_steps_equal_the_full_forward(architecture: Architecture, implementation: str, pair: Pair) -> None:
    assert comparisons.steps(architecture, pair) <= allowed(architecture)


@every_variant([a for a in (*PURE, *HYBRIDS) if a.positions != "offset"])
def test_rows_of_a_padded_batch_with_unequal_memories_equal_each_alone(
    architecture: Architecture, implementation: str, pair: Pair
) -> None:
    """Not where frequencies depend on the longest row of a batch: there a row alone has others."""
    assert comparisons.padded_batch(pair) <= allowed(architecture)


def test_the_streams_of_an_unequal_memory_differ_in_length() -> None:
    memory = pair_of("llama", "eager").wrapped.new_memory(batch_size=2)
    memory.write([torch.full((tokens,), 5) for tokens in WRITTEN])
    assert [len(state.stm[0]) for state in memory.states] == [10, 8]


@every_variant([a for a in PURE if a.stable_cache])
def test_greedy_generation_equals_the_oracle(architecture: Architecture, implementation: str, pair: Pair) -> None:
    assert comparisons.greedy_generation(pair)


# Of the other architectures the logits of steps, of padded rows and greedy generation are tested above.
@every_variant_with("search", SEARCHES, always=(), architectures=[a for a in (*PURE, *HYBRIDS) if a.stable_cache])
def test_generation_is_the_same_with_and_without_a_cache_and_in_a_padded_batch(
    architecture: Architecture, implementation: str, pair: Pair, search: str
) -> None:
    assert comparisons.generation(pair, search)


@every(HYBRIDS)
def test_hybrids_carry_memory_in_their_attention_layers_only(architecture: Architecture) -> None:
    pair = pair_of(architecture.name, architecture.implementations[-1])
    memory, ids = pair.memory(), pair.text(9)
    assert len(memory.states[0].stm) == 2 == len(pair.wrapped.model.layers) // 2
    with_memory = pair.wrapped(input_ids=ids, memory=memory).logits
    assert comparisons.error(with_memory, pair.wrapped(input_ids=ids).logits) >= 1
    assert comparisons.techniques(pair) <= allowed(architecture)


REASONS = {
    "mamba": "no attention layer that writes a key/value cache",
    "rwkv": "no attention layer that writes a key/value cache",
    "mpt": "memory acts: memory moves the logits by .* only",
    "falcon-alibi": "uses ALiBi, and has no build_alibi_tensor",
    "gpt-neo": "left-padded row = row alone: relative error",
}


@every(REFUSED)
def test_what_cannot_carry_a_memory_is_refused_with_the_reason_and_left_as_it_was(architecture: Architecture) -> None:
    model = architecture.build()
    ids = torch.arange(2, 12)[None]
    before = type(model), model(input_ids=ids).logits, list(model.state_dict())
    with pytest.raises(NotSupported, match=REASONS[architecture.name]):
        mplus.wrap(model, config_for(architecture))
    assert type(model) is before[0]
    assert torch.equal(model(input_ids=ids).logits, before[1])
    assert list(model.state_dict()) == before[2]


def test_techniques_and_positions_are_chosen_as_documented() -> None:
    chosen = {}
    names = (
        "llama",
        "falcon-new",
        "bloom",
        "phi3-longrope",
        "llama-dynamic",
        "gpt2",
        "diffllama",
        "hunyuan",
        "codegen",
    )
    for name in names:
        retrofit_of = pair_of(name, BY_NAME[name].implementations[0]).wrapped.mplus_engine.retrofit
        chosen[name] = (retrofit_of.technique, retrofit_of.positions.offset)
    assert chosen == {
        "llama": ("attention", False),
        "falcon-new": ("cache_view", False),
        "bloom": ("cache_view", False),
        "phi3-longrope": ("attention", True),
        "llama-dynamic": ("attention", True),
        "gpt2": ("attention", False),
        "diffllama": ("cache_view", False),
        "hunyuan": ("attention", True),
        "codegen": ("cache_view", True),
    }
