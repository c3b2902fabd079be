"""Rows made of what layers receive: where K is the length of a chunk, M+ reads a text as the decoder itself does."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import torch

import mplus
from mplus.errors import ConfigError
from mplus.hf.pretrained.shipped import load_decoder
from mplus.testing.mechanisms.suite import CHUNK, VOCABULARY
from mplus.testing.rounding import InFloat64, check_close
from mplus.training.decoder import make_batched_streams

if TYPE_CHECKING:
    from mplus.hf.model.model_class import MemoryModel

IDS = torch.randint(3, VOCABULARY, (3, CHUNK), generator=torch.Generator().manual_seed(0))


@cache
def wrapped(rows_per_chunk: int = CHUNK, **options: str) -> MemoryModel:
    config: dict[str, Any] = {"adapters": None, "long_term_tokens": 0, "retrieved_tokens": 0}
    config.update(chunk_tokens=CHUNK, memory_tokens_per_chunk=rows_per_chunk, short_term_tokens=2 * CHUNK)
    return mplus.wrap(load_decoder(), mplus.MPlusConfig(mechanism={"name": "mplus", **options}, **config))


def read(model: MemoryModel) -> torch.Tensor:
    memory = model.new_memory()
    memory.write(IDS[:2].flatten())
    found: torch.Tensor = model(IDS[2:], memory=memory).logits[0]
    return found


@torch.no_grad()
def test_untrained_it_reads_two_chunks_as_the_decoder_reads_their_text() -> None:
    decoder = load_decoder()
    text = torch.cat([torch.tensor([[decoder.config.bos_token_id]]), IDS.view(1, -1)], 1)
    plain = decoder(text).logits[0, -CHUNK:]
    with InFloat64():
        exact = decoder.double()(text).logits[0, -CHUNK:]
    for tokens in ("last", "even", "unlikely"):  # where there are as many rows as tokens these are the same
        check_close(read(wrapped(rows="inputs", begin="inputs", tokens=tokens)), plain, exact)
    for others in ({}, {"rows": "inputs"}, {"begin": "inputs"}):
        assert (read(wrapped(**others)) - exact).abs().max() > 1


@torch.no_grad()
def test_the_oldest_rows_leave_together_in_memories_and_in_training() -> None:
    model = wrapped(CHUNK // 2, rows="inputs", begin="inputs", drop="oldest")
    memory = model.new_memory(seed=3)
    streams = make_batched_streams(model.mplus_engine, range(1), seed=3, long_term_tokens=0)
    for number in range(6):  # there is room for four chunks
        ids = IDS[number % 3]
        memory.write(ids)
        streams.write(ids[None], torch.full((1,), number))
        state: Any = memory.states[0]
        first = max(number - 3, 0) * (CHUNK // 2)
        for layer, rows in enumerate(state.stm):
            assert rows.birth.tolist() == list(range(first, state.clock))
            assert torch.equal(rows.need_hidden(), streams.stm[layer][0])


@torch.no_grad()
@pytest.mark.parametrize("tokens", ["last", "even", "unlikely"])
def test_training_writes_the_same_rows(tokens: str) -> None:
    model = wrapped(CHUNK // 2, rows="inputs", begin="inputs", tokens=tokens)
    memory = model.new_memory()
    memory.write(IDS[:2].flatten())
    streams = make_batched_streams(model.mplus_engine, range(1), seed=0, long_term_tokens=0)
    for chunk in IDS[:2]:
        streams.write(chunk[None], torch.zeros(1, dtype=torch.int64))
    state: Any = memory.states[0]
    for rows, batched in zip(state.stm, streams.stm, strict=True):
        assert torch.equal(rows.need_hidden(), batched[0])


@torch.no_grad()
def test_rows_at_even_distances_are_those_of_every_second_token_with_the_mark() -> None:
    every, second = wrapped(rows="inputs", begin="inputs"), wrapped(CHUNK // 2, rows="inputs", tokens="even")
    found = []
    for model in (every, second):
        memory = model.new_memory()
        memory.write(IDS[0])
        state: Any = memory.states[0]
        found.append(state.stm[0].need_hidden())
    assert torch.equal(found[1], found[0][1::2])
    mark = torch.full_like(second.mplus.mark, 0.5)
    second.mplus.mark.copy_(mark)
    try:
        memory = second.new_memory()
        memory.write(IDS[0])
        state = memory.states[0]
        assert torch.equal(state.stm[0].need_hidden(), found[1] + mark[0])
    finally:
        second.mplus.mark.zero_()


@torch.no_grad()
def test_rows_of_unlikely_tokens_are_those_that_the_decoder_would_not_have_guessed() -> None:
    every, half = (
        wrapped(rows="inputs", begin="inputs"),
        wrapped(CHUNK // 2, rows="inputs", begin="inputs", tokens="unlikely"),
    )
    found, first = [], IDS[0]
    for model in (every, half):
        memory = model.new_memory()
        memory.write(first)
        state: Any = memory.states[0]
        found.append(state.stm[1].need_hidden())
    places = [int((found[0] == row).all(-1).nonzero()[0]) for row in found[1]]
    decoder = load_decoder()
    ids = torch.cat([torch.tensor([[decoder.config.bos_token_id]]), first[None]], 1)
    likely = decoder(ids).logits[0, 1:-1].log_softmax(-1).gather(-1, first[1:, None])[:, 0]
    unlikely = likely.topk(CHUNK // 2 - 1, largest=False).indices + 1
    assert places == [0, *sorted(unlikely.tolist())]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mplus", {"rows": "hidden"}, "rows"),
        ("mplus", {"begin": "zero"}, "begin"),
        ("mplus", {"drop": "newest"}, "drop must be one of 'random', 'oldest'"),
        ("mplus", {"tokens": "odd"}, "tokens must be one of 'last', 'even', 'unlikely'"),
        ("memoryllm", {"tokens": "even", "tile_first": True}, "tokens must be 'last' with tile_first"),
        ("memoryllm", {"rows": "inputs", "tile_first": True}, "rows must be 'outputs' with tile_first"),
    ],
)
def test_other_values_are_refused_by_name(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        mplus.wrap(load_decoder(), mplus.MPlusConfig(mechanism={"name": name, **options}))
