"""Every architecture, in every attention implementation, against the placeholder oracle or against itself."""

from __future__ import annotations

import functools

import pytest
import torch

from mplus.errors import NotSupported
from tests import oracle
from tests.architectures import BY_NAME, HYBRIDS, PURE, REFUSED, Architecture, every, every_variant
from tests.retrofitted import CHUNK, K, Pair, config_for, retrofit

TOLERANCE = 2e-5
"""Largest absolute error in float32, for logits of standard deviation one to three."""
HYBRID_TOLERANCE = 1e-4
"""Recurrences run step by step round differently: without a memory the same comparisons differ by up to 2.6e-4."""


@functools.cache
def pair_of(name: str, implementation: str, query_tokens: int | None = None) -> Pair:
    """Built once: nothing a test does changes the weights."""
    return retrofit(BY_NAME[name], implementation, query_tokens=query_tokens)


@pytest.fixture
def pair(architecture: Architecture, implementation: str) -> Pair:
    """The pair under test. Rotary embeddings that remember the longest sequence start from a short one."""
    found = pair_of(architecture.name, implementation)
    found.wrapped(input_ids=found.text(1))
    return found


@pytest.fixture(autouse=True)
def _no_gradients() -> object:
    with torch.no_grad():
        yield


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


@every_variant((*PURE, *HYBRIDS))
def test_without_a_memory_the_logits_are_those_of_the_base_model(
    architecture: Architecture, implementation: str, pair: Pair
) -> None:
    ids = pair.text(20)
    plain = architecture.build(0, implementation)
    assert torch.equal(pair.wrapped(input_ids=ids).logits, plain(input_ids=ids).logits)


@every_variant()
def test_reading_the_stm_equals_the_oracle(architecture: Architecture, implementation: str, pair: Pair) -> None:
    memory = pair.memory(chunks=2)
    (view,) = memory.snapshot()
    assert view.store.count(0) == 0
    ids = pair.text(9)
    expected = oracle.read(
        pair.plain, ids, [torch.cat([b, r.hidden]) for b, r in zip(pair.begin, view.state.stm, strict=True)]
    )
    assert error(pair.wrapped(input_ids=ids, memory=memory).logits, expected) <= TOLERANCE
    assert error(pair.plain(input_ids=ids).logits, expected) >= 1, "memory must matter for the comparison to mean anything"


@every_variant()
def test_reading_with_retrieval_equals_the_oracle(architecture: Architecture, implementation: str, pair: Pair) -> None:
    memory = pair.memory()
    (view,) = memory.snapshot()
    assert view.store.count(0) > 6
    ids = pair.text(9)
    expected = oracle.read_with_retrieval(pair.plain, ids, pair.retrieving(view), pair.rows(view))
    assert error(pair.wrapped(input_ids=ids, memory=memory).logits, expected) <= TOLERANCE


@every_variant()
@pytest.mark.parametrize("chunks", [0, 1, 3])
@pytest.mark.parametrize("tokens", [CHUNK, K, K - 1, 1])
def test_writing_equals_the_oracle(
    architecture: Architecture, implementation: str, pair: Pair, tokens: int, chunks: int
) -> None:
    memory = pair.memory(chunks=chunks) if chunks else pair.wrapped.new_memory()
    (state,) = memory.states
    ids = pair.text(tokens)
    context = [rows.hidden[-K:] for rows in state.stm]
    expected = oracle.write(pair.plain, ids, pair.begin, context, mark=pair.mark, k=K)
    pair.wrapped(input_ids=pair.text(1))
    made = memory.engine.encode([state], ids)
    assert len(made) == len(expected)
    for got, wanted in zip(made, expected, strict=True):
        assert error(got[0], wanted) <= TOLERANCE


@every_variant((*PURE, *HYBRIDS))
def test_prefill_and_steps_equal_the_full_forward(architecture: Architecture, implementation: str, pair: Pair) -> None:
    if not architecture.stable_cache:
        pytest.skip("a growing sequence changes the frequencies of keys already cached, with or without memory")
    memory, ids = pair.memory(), pair.text(16)
    # What is retrieved depends on the prompt: both ways read the rows that the first ten tokens retrieve.
    full = pair.wrapped(input_ids=ids[:, :10], memory=memory, use_cache=True)
    logits, cache = [full.logits], full.past_key_values
    # State-space layers take one token at a time once they have a cache.
    steps = zip(range(10, 16), range(11, 17)) if architecture.hybrid else ((10, 11), (11, 14), (14, 16))
    for start, stop in steps:
        step = pair.wrapped(input_ids=ids[:, start:stop], memory=memory, past_key_values=cache, use_cache=True)
        logits.append(step.logits)
    limited = pair_of(architecture.name, implementation, query_tokens=10)
    expected = limited.wrapped(input_ids=ids, memory=limited.memory()).logits
    assert error(torch.cat(logits, 1), expected) <= (HYBRID_TOLERANCE if architecture.hybrid else TOLERANCE)


@every_variant((*PURE, *HYBRIDS))
def test_rows_of_a_padded_batch_with_unequal_memories_equal_each_alone(
    architecture: Architecture, implementation: str, pair: Pair
) -> None:
    long, short = pair.text(11, seed=1), pair.text(7, seed=2)
    memory = pair.wrapped.new_memory(batch_size=2)
    memory.write([pair.text(70, seed=3)[0], pair.text(16, seed=4)[0]])
    assert [len(state.stm[0]) for state in memory.states] == [10, 8]
    ids = torch.cat([long, torch.cat([torch.zeros(1, 4, dtype=torch.int64), short], 1)])
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    together = pair.wrapped(input_ids=ids, attention_mask=mask, memory=memory).logits
    for row, (text, written) in enumerate(((long, pair.text(70, seed=3)), (short, pair.text(16, seed=4)))):
        alone = pair.wrapped.new_memory(seed=row)
        alone.write(written[0])
        expected = pair.wrapped(input_ids=text, memory=alone).logits
        if architecture.positions == "offset":
            # Frequencies depend on the longest row of a batch, so a row alone has others.
            continue
        allowed = HYBRID_TOLERANCE if architecture.hybrid else TOLERANCE
        assert error(together[row : row + 1, -text.shape[1] :], expected) <= allowed


@every_variant()
def test_greedy_generation_equals_the_oracle(architecture: Architecture, implementation: str, pair: Pair) -> None:
    if not architecture.stable_cache:
        pytest.skip("a growing sequence changes the frequencies of keys already cached, with or without memory")
    memory = pair.memory(chunks=2)
    (view,) = memory.snapshot()
    ids = pair.text(8)
    rows = [torch.cat([b, r.hidden]) for b, r in zip(pair.begin, view.state.stm, strict=True)]
    expected = oracle.generate_greedy(pair.plain, ids, rows, 6)
    assert pair.wrapped.generate(ids, memory=memory, max_new_tokens=6).tolist() == expected.tolist()


SEARCHES = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 0.8},
}


@every_variant((*PURE, *HYBRIDS))
@pytest.mark.parametrize("search", SEARCHES)
def test_generation_is_the_same_with_and_without_a_cache_and_in_a_padded_batch(
    architecture: Architecture, implementation: str, pair: Pair, search: str
) -> None:
    if not architecture.stable_cache:
        pytest.skip("a growing sequence changes the frequencies of keys already cached, with or without memory")
    prompts = pair.text(9, seed=1), pair.text(6, seed=2)
    memory = pair.wrapped.new_memory(batch_size=2)
    memory.write([pair.text(70, seed=3)[0], pair.text(16, seed=4)[0]])
    ids = torch.cat([prompts[0], torch.cat([torch.zeros(1, 3, dtype=torch.int64), prompts[1]], 1)])
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        found.append(
            pair.wrapped.generate(
                ids, attention_mask=mask, memory=memory, max_new_tokens=6, use_cache=use_cache, **SEARCHES[search]
            )
        )
    assert found[0].tolist() == found[1].tolist()
    if search == "sampling":
        return  # rows of a batch draw from one stream of random numbers
    for row, prompt in enumerate(prompts):
        alone = pair.wrapped.new_memory(seed=row)
        alone.write(pair.text((70, 16)[row], seed=3 + row)[0])
        expected = pair.wrapped.generate(prompt, memory=alone, max_new_tokens=6, **SEARCHES[search])
        assert found[0][row, -6:].tolist() == expected[0, -6:].tolist()


@every(HYBRIDS)
def test_hybrids_carry_memory_in_their_attention_layers_only(architecture: Architecture) -> None:
    pair = retrofit(architecture)
    memory = pair.memory()
    assert len(memory.states[0].stm) == 2 == len(pair.wrapped.model.layers) // 2
    ids = pair.text(9)
    with_memory = pair.wrapped(input_ids=ids, memory=memory).logits
    assert error(with_memory, pair.wrapped(input_ids=ids).logits) >= 1
    # The registered attention function against the cache view: another way to the same numbers.
    retrofit_of = pair.wrapped.mplus_engine.retrofit
    assert retrofit_of.technique == "attention"
    retrofit_of.technique = "cache_view"
    assert error(pair.wrapped(input_ids=ids, memory=memory).logits, with_memory) <= TOLERANCE


@every(REFUSED)
def test_decoders_without_attention_are_refused_with_the_reason(architecture: Architecture) -> None:
    import mplus

    model = architecture.build()
    before = type(model)
    with pytest.raises(NotSupported, match="no attention layer that writes a key/value cache"):
        mplus.wrap(model, config_for(architecture))
    assert type(model) is before


def test_techniques_and_positions_are_chosen_as_documented() -> None:
    chosen = {}
    for name in ("llama", "falcon-new", "bloom", "phi3-longrope", "llama-dynamic", "gpt2"):
        retrofit_of = pair_of(name, BY_NAME[name].implementations[0]).wrapped.mplus_engine.retrofit
        chosen[name] = (retrofit_of.technique, retrofit_of.positions.offset)
    assert chosen == {
        "llama": ("attention", False),
        "falcon-new": ("cache_view", False),
        "bloom": ("cache_view", False),
        "phi3-longrope": ("attention", True),
        "llama-dynamic": ("attention", True),
        "gpt2": ("attention", False),
    }
