"""Which chunks come back, and which settings mean nothing to a memory of keys and values."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

import mplus
from mplus.config import AdapterConfig
from mplus.errors import ConfigError, MemorySizeWarning
from mplus.mechanisms.decoder import Text
from mplus.mechanisms.kv.state import KvState
from mplus.mechanisms.search import choose
from mplus.retrievers.chunks.bm25 import bm25
from mplus.stores.base import StoreLayout
from tests.mechanisms.kv.memories import logits, text, wrapped
from tests.memory import tiny

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


def read_chunks(model: Any, memory: Any, prompt: list[int], asked: int | None = None) -> list[list[int]]:
    """The ids of the chunks that ``prompt``, or its first ``asked`` tokens, brings back, in order of reading."""
    state = memory.states[0]
    query = None if asked is None else (torch.arange(len(prompt)) < asked)[None]
    text = Text(torch.tensor([prompt]), query=query, limited=asked is not None)
    opened = model.mplus_engine.mechanism.open(model.mplus_engine.decoder, memory.snapshot(), text)
    return [state.token_ids[state.places(chunk[None])].tolist() for chunk in opened.own.blocks[0][0].chunks]


def state_with(*chunks: list[int]) -> KvState:
    state = KvState.empty(StoreLayout(layers=1, hidden_size=2, key_size=0, expiry=False, projected_size=4))
    for chunk in chunks:
        state = state.with_chunk(torch.tensor(chunk), 0)
    return state


def by_hand(chunks: list[list[int]], query: set[int], k1: float, b: float) -> list[float]:
    mean = sum(map(len, chunks)) / len(chunks)
    scores = []
    for chunk in chunks:
        score = 0.0
        for word in query:
            among = sum(word in other for other in chunks)
            rarity = math.log(1 + (len(chunks) - among + 0.5) / (among + 0.5))
            count = chunk.count(word)
            score += rarity * count * (k1 + 1) / (count + k1 * (1 - b + b * len(chunk) / mean))
        scores.append(score)
    return scores


@pytest.mark.parametrize(("k1", "b"), [(1.5, 0.75), (0.5, 0.0), (3.0, 1.0)])
def test_scores_are_those_of_bm25(k1: float, b: float) -> None:
    generator = torch.Generator().manual_seed(0)
    chunks = [torch.randint(0, 12, (n,), generator=generator).tolist() for n in (3, 9, 1, 7, 7)]
    for query in ([4, 4, 7, 40], [40], list(range(12)), [0]):
        state = state_with(*chunks)
        found = bm25(state.chunk_length, state.token_ids, torch.tensor(query), k1, b)
        assert found.tolist() == pytest.approx(by_hand(chunks, set(query), k1, b))


def test_words_that_follow_each_other_count_as_pairs() -> None:
    chunks = [[7, 1, 2, 7], [2, 1, 7, 7], [1, 7, 2, 7], [7, 1], [2, 7, 7, 1], [1, 2, 1, 2]]
    state, query = state_with(*chunks), [1, 2, 9]
    alone = bm25(state.chunk_length, state.token_ids, torch.tensor(query), 1.5, 0.75)
    found = bm25(state.chunk_length, state.token_ids, torch.tensor(query), 1.5, 0.75, pairs=3.0)
    frequent = math.log(1 + (6 - 6 + 0.5) / (6 + 0.5))  # all chunks have 1, and five have 2
    assert (found - alone).tolist() == pytest.approx(
        [3 * frequent, 0, 0, 0, 0, 3 * frequent]
    )  # not from one to the next


@pytest.mark.parametrize(
    ("most", "scores", "wanted"),
    [
        (7, [1.0, 3.0, 2.0], [1, 2]),
        (5, [1.0, 3.0, 2.0], [1]),  # the next one does not fit, nor the one after
        (6, [1.0, 3.0, 0.5], [1]),
        (9, [1.0, 3.0, 0.5], [1, 0]),
        (99, [0.0, 0.0, 0.0], [2, 1, 0]),  # among equals the newer first
    ],
)
def test_whole_chunks_are_taken_while_they_fit(most: int, scores: list[float], wanted: list[int]) -> None:
    state = state_with([1] * 4, [2] * 5, [3] * 2)
    chosen = choose(state.chunk_length, torch.tensor(scores), most)
    assert chosen.tolist() == wanted
    assert int(state.chunk_length[chosen].sum()) <= most


def test_places_are_those_of_the_chunks_in_that_order() -> None:
    state = state_with([1] * 4, [2] * 5, [3] * 2)
    assert state.places(torch.tensor([2, 0])).tolist() == [9, 10, 0, 1, 2, 3]
    assert state.places(torch.tensor([], dtype=torch.int64)).tolist() == []


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"min_score": None}, [[3, 4, 5, 6], [9, 3, 4]]),
        ({"min_score": None, "order": "written"}, [[9, 3, 4], [3, 4, 5, 6]]),
        ({"retrieved_chunks": 1}, [[9, 3, 4]]),
        ({"min_score": 99}, []),
        ({"min_score": -1}, [[7, 8, 8], [3, 4, 5, 6], [9, 3, 4]]),
    ],
)
def test_chunks_that_share_rare_words_with_the_text_come_back_the_best_last(
    options: dict[str, Any], wanted: list[list[int]]
) -> None:
    model = wrapped(**{"order": "score", **options})
    memory = model.new_memory()
    for place, ids in enumerate(([9, 3, 4], [3, 4, 5, 6], [7, 8, 8])):
        memory.write(torch.tensor(ids), f"s{place}")
    assert read_chunks(model, memory, [2, 9, 3]) == wanted


def test_chunks_whose_ids_stand_in_the_prompt_are_not_brought_back() -> None:
    model = wrapped(min_score=None)
    memory = model.new_memory()
    memory.write(torch.tensor([9, 3, 4]), "a")
    memory.write(torch.tensor([9, 3]), "b")
    assert read_chunks(model, memory, [2, 9, 3, 4, 5]) == []
    assert read_chunks(model, memory, [2, 9, 5, 3, 4]) == [[9, 3, 4], [9, 3]]
    assert read_chunks(model, memory, [2, 9, 3]) == [[9, 3, 4]]
    read = read_chunks(model, memory, [2, 9, 3, 4], asked=2)
    assert read == [[9, 3, 4], [9, 3]], "what comes behind the tokens to retrieve with decides nothing"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"short_term_tokens": 9}, "short_term_tokens means nothing to the mechanism 'kv' .* got 9: leave it out"),
        ({"memory_tokens_per_chunk": 3}, "memory_tokens_per_chunk means nothing to the mechanism 'kv' .*got 3"),
        ({"drop_per_layer": False}, "drop_per_layer means nothing"),
        ({"memory_positions": "constant"}, "memory_positions means nothing"),
        ({"memory_positions": "compressed", "position_span": 4}, "memory_positions means nothing"),
        ({"variant": "published"}, "variant means nothing"),
        ({"memory_rows": "hidden"}, "memory_rows must be one of 'projected' or 'auto'"),
        ({"retrieved_tokens": 4}, r"retrieved_tokens must be at least chunk_tokens \(8\)"),
        ({"long_term_tokens": 0}, r"long_term_tokens must be at least chunk_tokens \(8\)"),
        ({"min_chunk_tokens": 3}, "min_chunk_tokens means nothing to the mechanism .kv., .* got 3: leave it out"),
        ({"context_chunks": 1, "long_term_tokens": 40}, "long_term_tokens does not go with the option context_chunks"),
        ({"context_chunks": None, "bytes_budget": "1GiB"}, "bytes_budget does not go with .* context_chunks .* None"),
        ({"begin": [1.5]}, "begin must be a list of token ids"),
        ({"begin": "no"}, "begin must be a list of token ids"),
        ({"retriever": {"name": "words", "b": 2}}, "b must be a number from 0 to 1"),
        ({"retriever": {"name": "words", "k1": -1}}, "k1 must be a number of at least 0"),
        ({"retrieved_chunks": 0}, "retrieved_chunks must be a whole number of at least 1"),
        ({"min_score": "high"}, "min_score must be a number, or None"),
        ({"context_chunks": -1}, "context_chunks must be a whole number of at least 0"),
    ],
)
def test_what_means_nothing_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        wrapped(**change)


def test_a_limit_does_not_go_with_chunks_that_are_written_behind_others() -> None:
    with pytest.raises(ConfigError, match=r"bytes_budget does not go with the option context_chunks .* got 2"):
        wrapped(context_chunks=2).new_memory(bytes_budget="1GiB")


def test_the_config_takes_the_threshold_that_is_also_an_option() -> None:
    def with_threshold(field: float | None, option: float | None, name: str = "kv") -> Any:
        options = {} if option is None else {"min_score": option}
        return mplus.wrap(tiny.BY_NAME["llama"].build(0), {"mechanism": {"name": name, **options}, "min_score": field})

    found = [with_threshold(*one).mplus_engine.mechanism.retrieval.min_score for one in ((2.5, None), (0, 0))]
    assert found == [2.5, 0]
    with pytest.raises(ConfigError, match=r"min_score must be given once, or be .* \(1.5\), got 2.5"):
        with_threshold(2.5, 1.5)
    for name in ("mplus", "memoryllm", "notes"):
        with pytest.raises(ConfigError, match=f"min_score .* the mechanism '{name}', .* got 2.5: leave it out"):
            with_threshold(2.5, None, name)
    with pytest.raises(ConfigError, match="min_score must be a number, or None, got 'high'"):
        mplus.MPlusConfig(min_score="high")


def test_sizes_left_open_are_its_own() -> None:
    model = mplus.wrap(tiny.BY_NAME["llama"].build(0), {"mechanism": "kv"})
    config = model.mplus_config
    assert (config.chunk_tokens, config.retrieved_tokens, config.min_chunk_tokens) == (64, 128, 1)
    assert (config.memory_tokens_per_chunk, config.short_term_tokens, config.adapters) == (64, None, None)
    assert "short_term" not in model.mplus_summary()
    assert (config.long_term_tokens, model.new_memory().capacity) == (None, None), "nothing leaves unless that is asked"
    assert wrapped(long_term_tokens=150_000).mplus_config.long_term_tokens == 150_000
    with pytest.warns(MemorySizeWarning, match=r"retrieved_tokens \(200\) rows .* 256 positions"):
        mplus.wrap(tiny.BY_NAME["llama"].build(0), {"mechanism": "kv", "retrieved_tokens": 200})


def test_adapters_that_are_asked_for_are_added() -> None:
    assert wrapped(adapters=AdapterConfig()).mplus_config.adapters == AdapterConfig()
    assert not [name for name, _ in wrapped().named_parameters() if ".lora_" in name]


def test_a_wrapped_decoder_is_saved_and_loaded_with_it(tmp_path: Path) -> None:
    model = wrapped(context_chunks=2, begin=[3, 4])
    memory = model.new_memory()
    memory.write(text(20), "a")
    before: Tensor = logits(model, text(7, 9)[None], memory)
    memory.save(tmp_path / "memory")
    model.save_pretrained(tmp_path / "model")
    again = mplus.from_pretrained(tmp_path / "model", base=tiny.BY_NAME["llama"].build(0))
    assert again.mplus_config == model.mplus_config
    found = logits(again, text(7, 9)[None], mplus.Memory.load(tmp_path / "memory", again))
    assert float((found - before).abs().max()) <= tiny.rounding()
