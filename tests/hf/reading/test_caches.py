"""A key/value cache belongs to the state of the memory it was made under."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from benchmarks.quality.architectures import oracle
from benchmarks.quality.architectures.decoders import BY_NAME
from benchmarks.quality.architectures.retrofitted import Pair, retrofit
from mplus.errors import MemoryMismatchError
from mplus.hf.reading.reading import retrieved_sources
from tests.hf.references import TOLERANCE, error, ids, merged, stir

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.two_computations

FIRST, SECOND = ids(1, 9, seed=1), ids(1, 6, seed=2)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def pair() -> Pair:
    made = retrofit(BY_NAME["llama"])
    stir(made.wrapped)
    return made


def expected_logits(pair: Pair, memory: Any) -> torch.Tensor:
    """Logits of both turns in one text, with what the first turn alone retrieves."""
    (view,) = memory.snapshot()
    retrieve, plain = pair.retrieving(view), merged(pair.plain, pair.wrapped, "read")
    text = torch.cat([FIRST, SECOND], 1)
    turn = FIRST.shape[1]
    return oracle.read_with_retrieval(plain, text, lambda layer, h: retrieve(layer, h[:, :turn]), pair.rows(view))


def cache_of(kind: str, model: Any) -> Any:
    return (
        DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=40)
    )


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_later_turn_reads_what_the_cache_was_made_with(pair: Pair, kind: str) -> None:
    memory, cache = pair.memory(), cache_of(kind, pair.wrapped)
    found = [pair.wrapped(turn, memory=memory, past_key_values=cache).logits for turn in (FIRST, SECOND)]
    assert error(torch.cat(found, 1), expected_logits(pair, memory)) < TOLERANCE


def greedy(model: Any, turn: torch.Tensor, cache: Any, steps: int, **options: Any) -> torch.Tensor:
    """A loop of plain forwards."""
    tokens, step = [turn], turn
    for _ in range(steps):
        step = model(step, past_key_values=cache, use_cache=True, **options).logits[:, -1:].argmax(-1)
        tokens.append(step)
    return torch.cat(tokens, 1)


def test_generation_in_turns(pair: Pair) -> None:
    model, memory = pair.wrapped, pair.memory()
    options: dict[str, Any] = {"memory": memory, "do_sample": False, "max_new_tokens": 4}
    cache, by_hand = DynamicCache(config=model.config), DynamicCache(config=model.config)
    said = model.generate(FIRST, past_key_values=cache, **options)
    assert torch.equal(said, greedy(model, FIRST, by_hand, 4, memory=memory))
    asked = torch.cat([said, SECOND], 1)
    found = model.generate(asked, past_key_values=cache, **options)
    expected = greedy(model, asked[:, by_hand.get_seq_length() :], by_hand, 4, memory=memory)
    assert torch.equal(found[:, asked.shape[1] :], expected[:, -4:])


def test_writing_ends_a_cache(pair: Pair) -> None:
    model, memory = pair.wrapped, pair.memory()
    cache = model(FIRST, memory=memory, use_cache=True).past_key_values
    old = expected_logits(pair, memory)
    memory.write(ids(1, 12, seed=5))
    for use in (
        lambda: model(SECOND, memory=memory, past_key_values=cache),
        lambda: model.generate(torch.cat([FIRST, SECOND], 1), memory=memory, past_key_values=cache, max_new_tokens=2),
    ):
        with pytest.raises(MemoryMismatchError, match=r"reuse_memory_cache=True"):
            use()
    found = model(SECOND, memory=memory, past_key_values=cache, reuse_memory_cache=True).logits
    assert error(found, old[:, FIRST.shape[1] :]) < TOLERANCE


def test_generating_on_with_an_older_state(pair: Pair) -> None:
    model, memory = pair.wrapped, pair.memory()
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4}
    cache = model(FIRST, memory=memory, use_cache=True).past_key_values
    expected = model.generate(
        torch.cat([FIRST, SECOND], 1), memory=memory, past_key_values=copy.deepcopy(cache), **options
    )
    memory.write(ids(1, 12, seed=5))
    found = model.generate(
        torch.cat([FIRST, SECOND], 1), memory=memory, past_key_values=cache, reuse_memory_cache=True, **options
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("before", "after"),
    [("memory", "none"), ("none", "memory"), ("memory", "another memory"), ("memory", "fork")],
)
def test_a_cache_does_not_change_hands(pair: Pair, before: str, after: str) -> None:
    model, memory = pair.wrapped, pair.memory()
    memories = {"memory": memory, "none": None, "another memory": pair.memory(seed=1), "fork": memory.fork()}
    cache = model(FIRST, memory=memories[before], use_cache=True).past_key_values
    with pytest.raises(MemoryMismatchError, match="past_key_values was made"):
        model(SECOND, memory=memories[after], past_key_values=cache)


def test_retrieving_anew_in_a_later_turn(pair: Pair) -> None:
    model, memory = pair.wrapped, pair.memory()
    cache = model(FIRST, memory=memory, use_cache=True).past_key_values
    options: dict[str, Any] = {"memory": memory, "max_new_tokens": 4, "output_sources": True, "do_sample": False}
    options |= {"return_dict_in_generate": True}
    text = torch.cat([FIRST, SECOND], 1)
    kept = model.generate(text, past_key_values=copy.deepcopy(cache), **options).memory_sources
    assert kept == retrieved_sources(cache._mplus_reading)
    again = model.generate(text, past_key_values=copy.deepcopy(cache), retrieve_every=3, **options).memory_sources
    assert again != kept


def test_without_memory_caches_work_as_ever(pair: Pair) -> None:
    model, base = pair.wrapped, BY_NAME["llama"].build()
    found, expected = DynamicCache(config=model.config), DynamicCache(config=model.config)
    for turn in (FIRST, SECOND):
        a, b = model(turn, past_key_values=found).logits, base(turn, past_key_values=expected).logits
        assert torch.equal(a, b)


def test_an_emptied_cache_starts_anew(pair: Pair) -> None:
    model, memory = pair.wrapped, pair.memory()
    cache = StaticCache(config=model.config, max_cache_len=20)
    model(FIRST, memory=memory, past_key_values=cache)
    cache.reset()
    memory.write(ids(1, 24, seed=5))
    fresh = StaticCache(config=model.config, max_cache_len=20)
    expected = model(SECOND, memory=memory, past_key_values=fresh).logits
    assert torch.equal(model(SECOND, memory=memory, past_key_values=cache).logits, expected)
    cache.reset()
    assert torch.equal(model(SECOND, past_key_values=cache).logits, BY_NAME["llama"].build()(SECOND).logits)


def test_a_copied_cache_goes_its_own_way(pair: Pair) -> None:
    """The usual way to start several continuations from one prompt."""
    model, memory = pair.wrapped, pair.memory()
    cache = model(FIRST, memory=memory, use_cache=True).past_key_values
    twin = copy.deepcopy(cache)
    assert twin._mplus_reading.memory is memory
    assert twin._mplus_reading.mechanism is model.mplus_engine.mechanism
    expected = expected_logits(pair, memory)[:, FIRST.shape[1] :]
    for one in (cache, twin):
        assert error(model(SECOND, memory=memory, past_key_values=one).logits, expected) < TOLERANCE
    assert twin.get_seq_length() == cache.get_seq_length() == FIRST.shape[1] + SECOND.shape[1]


def test_a_cropped_cache_still_belongs_to_its_memory(pair: Pair) -> None:
    model, memory = pair.wrapped, pair.memory()
    cache = model(torch.cat([FIRST, ids(1, 3, seed=7)], 1), memory=memory, use_cache=True).past_key_values
    cache.crop(-3)
    found = model(SECOND, memory=memory, past_key_values=cache).logits
    (view,) = memory.snapshot()
    retrieve, plain = pair.retrieving(view), merged(pair.plain, pair.wrapped, "read")
    rows: list[torch.Tensor] = []

    def keep(layer: int, hidden: torch.Tensor) -> torch.Tensor:
        rows.append(retrieve(layer, hidden))
        return rows[-1]

    oracle.read_with_retrieval(plain, torch.cat([FIRST, ids(1, 3, seed=7)], 1), keep, pair.rows(view))
    expected = oracle.read(plain, torch.cat([FIRST, SECOND], 1), rows)[:, FIRST.shape[1] :]
    assert error(found, expected) < TOLERANCE


def test_a_memory_of_another_model_is_refused(pair: Pair) -> None:
    other = retrofit(BY_NAME["llama"]).memory()
    with pytest.raises(MemoryMismatchError, match="another model"):
        pair.wrapped(FIRST, memory=other)
    with pytest.raises(MemoryMismatchError, match="another model"):
        pair.wrapped.generate(FIRST, memory=other)
    with pytest.raises(MemoryMismatchError, match=r"mplus\.Memory, got str"):
        pair.wrapped(FIRST, memory="a memory")
    memory, narrow = pair.memory(), pair.wrapped.to(torch.bfloat16)
    with pytest.raises(MemoryMismatchError, match=r"memory\.to\(dtype=torch\.bfloat16\)"):
        narrow(FIRST, memory=memory)
