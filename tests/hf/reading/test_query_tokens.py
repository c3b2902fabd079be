"""Which tokens retrieve: ``query_tokens`` of a call, padding, and arguments that are misspelt."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from benchmarks.quality.architectures import oracle
from benchmarks.quality.architectures.decoders import BOS, BY_NAME
from benchmarks.quality.architectures.retrofitted import Pair, retrofit
from mplus.errors import ArgumentError, ConfigError, InputError
from mplus.hf.reading.retrieval import without_padding
from tests.hf.references import TOLERANCE, error, ids, merged, stir

pytestmark = pytest.mark.two_computations

GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}


@functools.cache
def shared(name: str = "llama") -> tuple[Pair, Any, Any]:
    pair = retrofit(BY_NAME[name])
    stir(pair.wrapped)
    return pair, merged(pair.plain, pair.wrapped, "read"), pair.memory()


def asking_with(text: Tensor, tokens: int, name: str = "llama") -> Tensor:
    """``[1, T, V]`` logits of ``text`` by the oracle, where the first ``tokens`` retrieve."""
    pair, plain, memory = shared(name)
    (view,) = memory.snapshot()
    retrieve = pair.retrieving(view)
    return oracle.read_with_retrieval(plain, text, lambda layer, h: retrieve(layer, h[:, :tokens]), pair.rows(view))


class Keeping:
    """Keeps what ``retrieve`` finds for each layer in turn."""

    def __init__(self, retrieve: Any) -> None:
        self.retrieve, self.found = retrieve, []

    def __call__(self, layer: int, text: Tensor) -> Tensor:
        self.found.append(self.retrieve(layer, text).detach())
        return self.found[-1]


def score(*args: Any, name: str = "llama", **options: Any) -> Tensor:
    pair, _, memory = shared(name)
    with torch.no_grad():
        return pair.wrapped(*args, memory=memory, **options).logits


def padded(rows: list[Tensor], side: str, filler: int = 0) -> tuple[Tensor, Tensor]:
    """Rows ``[1, T]`` of different length as one batch, and its mask."""
    longest = max(row.shape[1] for row in rows)
    text, mask = torch.full((len(rows), longest), filler), torch.zeros(len(rows), longest, dtype=torch.int64)
    for place, row in enumerate(rows):
        own = slice(longest - row.shape[1], None) if side == "left" else slice(row.shape[1])
        text[place, own], mask[place, own] = row[0], 1
    return text, mask


# ---------------------------------------------------------------- query_tokens


@pytest.mark.parametrize("tokens", [1, 4, 12, 99])
def test_the_first_tokens_retrieve(tokens: int) -> None:
    text = ids(1, 12)
    assert error(score(text, query_tokens=tokens), asking_with(text, tokens)) < TOLERANCE


def test_the_number_of_tokens_decides() -> None:
    assert error(score(ids(1, 12), query_tokens=3), score(ids(1, 12))) > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", [list, tuple, torch.tensor])
@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon-new"])
def test_one_number_per_row_is_that_of_the_row_alone(side: str, kind: Any, name: str) -> None:
    rows, counts = [ids(1, 12, seed=1), ids(1, 7, seed=2), ids(1, 9, seed=3)], [5, 2, 9]
    text, mask = padded(rows, side)
    found = score(text, attention_mask=mask, query_tokens=kind(counts), name=name)
    for row, (alone, count) in enumerate(zip(rows, counts, strict=True)):
        expected = asking_with(alone, count, name)
        assert error(found[row][mask[row].bool()], expected[0]) < TOLERANCE


def test_right_padding_needs_no_mask_where_every_row_says_its_own() -> None:
    rows, counts = [ids(1, 12, seed=1), ids(1, 7, seed=2)], [5, 2]
    found = score(padded(rows, "right", filler=int(rows[1][0, -1]))[0], query_tokens=counts)
    for row, (alone, count) in enumerate(zip(rows, counts, strict=True)):
        assert error(found[row, : alone.shape[1]], asking_with(alone, count)[0]) < TOLERANCE


def test_embeddings_instead_of_ids() -> None:
    pair, _, _ = shared()
    text = ids(1, 12)
    embedded = pair.wrapped.get_input_embeddings()(text).detach()
    assert error(score(inputs_embeds=embedded, query_tokens=4), asking_with(text, 4)) < TOLERANCE
    found = pair.wrapped.generate(inputs_embeds=embedded, memory=shared()[2], query_tokens=4, **GREEDY)
    assert torch.equal(found, pair.wrapped.generate(text, memory=shared()[2], query_tokens=4, **GREEDY)[:, 12:])


def test_a_cache_keeps_what_its_first_tokens_retrieved() -> None:
    pair, _, memory = shared()
    text = ids(1, 12)
    with torch.no_grad():
        first = pair.wrapped(text[:, :8], memory=memory, query_tokens=4)
        rest = pair.wrapped(text[:, 8:], memory=memory, past_key_values=first.past_key_values, query_tokens=2).logits
    assert error(torch.cat([first.logits, rest], 1), asking_with(text, 4)) < TOLERANCE


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 3}], ids=str)
def test_generation_with_the_first_tokens_of_every_prompt(options: dict[str, Any]) -> None:
    pair, plain, memory = shared()
    (view,) = memory.snapshot()
    retrieve, rows, counts = pair.retrieving(view), [ids(1, 9, seed=1), ids(1, 6, seed=2)], (4, 2)
    text, mask = padded(rows, "left")
    options = {**GREEDY, **options}
    output = pair.wrapped.generate(
        text, attention_mask=mask, memory=memory.select([0, 0]), query_tokens=counts, **options
    )
    for row, (prompt, count) in enumerate(zip(rows, counts, strict=True)):
        if "num_beams" in options:
            alone = pair.wrapped.generate(prompt, memory=memory, query_tokens=count, **options)
        else:
            keep = Keeping(lambda layer, h, count=count: retrieve(layer, h[:, :count]))
            oracle.read_with_retrieval(plain, prompt, keep, pair.rows(view))
            alone = oracle.generate_greedy(plain, prompt, keep.found, 5)
        assert torch.equal(output[row, 9:], alone[0, prompt.shape[1] :])


@pytest.mark.parametrize("value", [0, -3, True, 1.5, "4", [2, 0], [2.0], [[1]]], ids=str)
def test_query_tokens_must_be_counts(value: Any) -> None:
    pair, _, memory = shared()
    for call in (pair.wrapped, functools.partial(pair.wrapped.generate, **GREEDY)):
        with pytest.raises(ConfigError, match=r"query_tokens must be a whole number of at least 1.* got "):
            call(ids(1, 9), memory=memory, query_tokens=value)


def test_query_tokens_must_be_as_many_as_rows() -> None:
    pair, _, memory = shared()
    for call in (pair.wrapped, functools.partial(pair.wrapped.generate, **GREEDY)):
        with pytest.raises(
            InputError, match="query_tokens must be one whole number or one per row, got 2 for a batch of 1"
        ):
            call(ids(1, 9), memory=memory, query_tokens=[2, 3])


# ---------------------------------------------------------------- what was retrieved


@pytest.mark.parametrize("tokens", [None, 3])
def test_forward_tells_what_it_retrieved(tokens: int | None) -> None:
    pair, _, memory = shared()
    with torch.no_grad():
        output = pair.wrapped(ids(1, 9), memory=memory, query_tokens=tokens, output_sources=True)
    generated = pair.wrapped.generate(
        ids(1, 9), memory=memory, query_tokens=tokens, output_sources=True, return_dict_in_generate=True, **GREEDY
    )
    assert output.memory_sources == generated.memory_sources
    assert {entry.source for layer in output.memory_sources[0] for entry in layer} == {"text 0"}


def test_a_tuple_has_no_place_for_sources() -> None:
    pair, _, memory = shared()
    with pytest.raises(ConfigError, match="output_sources needs return_dict=True"):
        pair.wrapped(ids(1, 9), memory=memory, output_sources=True, return_dict=False)
    with pytest.raises(ConfigError, match="output_sources must be True or False, got 'yes'"):
        pair.wrapped(ids(1, 9), memory=memory, output_sources="yes")


# ---------------------------------------------------------------- padding without a mask


def test_what_looks_like_padding_does_not_retrieve() -> None:
    assert without_padding(torch.tensor([[3, 4, 4, 4], [5, 5, 5, 5], [3, 4, 5, 6], [4, 4, 4, 3]])).tolist() == [
        [True, False, False, False],
        [True] * 4,
        [True] * 4,
        [True] * 4,
    ]
    assert without_padding(torch.tensor([[3, 4], [0, 0]]), padding_id=4).tolist() == [[True, False], [True, True]]
    assert without_padding(torch.tensor([[4]]), padding_id=4).tolist() == [[True]]


@pytest.mark.parametrize("filler", [0, BOS, 77])
def test_right_padding_without_a_mask_changes_nothing(filler: int) -> None:
    text = ids(1, 9, seed=4)
    assert int(text[0, -1]) != filler
    found = score(torch.cat([text, torch.full((1, 4), filler)], 1))
    assert error(found[:, :9], asking_with(text, 9)) < TOLERANCE
    masked = score(torch.cat([text, torch.full((1, 4), filler)], 1), attention_mask=torch.ones(1, 13))
    assert error(masked[:, :9], found[:, :9]) > 1e-3  # a mask that says it is text is believed


def test_a_text_of_one_id_retrieves_with_all_of_it() -> None:
    text = torch.full((1, 6), 7)
    assert error(score(text), asking_with(text, 6)) < TOLERANCE


def test_prompts_of_a_generation_retrieve_like_texts() -> None:
    pair, _, memory = shared()
    prompt = torch.cat([ids(1, 9, seed=4), torch.full((1, 3), 77)], 1)
    options = {"output_logits": True, "return_dict_in_generate": True, **GREEDY}
    found = pair.wrapped.generate(prompt, memory=memory, **options).logits[0]
    assert error(found, asking_with(prompt, 9)[:, -1]) < TOLERANCE
    found = pair.wrapped.generate(prompt, attention_mask=torch.ones_like(prompt), memory=memory, **options).logits[0]
    assert error(found, asking_with(prompt, 12)[:, -1]) < TOLERANCE


# ---------------------------------------------------------------- misspelt arguments


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("memry", "memory"),
        ("memory_", "memory"),
        ("Memory", "memory"),
        ("memories", "memory"),
        ("query_token", "query_tokens"),
        ("retrieve_evry", "retrieve_every"),
        ("output_source", "output_sources"),
        ("reuse_memory", "reuse_memory_cache"),
    ],
)
def test_misspelt_arguments_are_refused(name: str, meant: str) -> None:
    pair, _, memory = shared()
    for call in (pair.wrapped, functools.partial(pair.wrapped.generate, **GREEDY)):
        for options in ({}, {"memory": memory}):
            with pytest.raises(ArgumentError, match=f"unknown argument '{name}': did you mean '{meant}'") as caught:
                call(ids(1, 9), **options, **{name: None})
            assert isinstance(caught.value, TypeError)


def test_arguments_of_transformers_pass() -> None:
    pair, _, memory = shared()
    with pytest.raises(ArgumentError, match="did you mean 'retrieve_every'"):
        pair.wrapped.generate(ids(1, 9), GenerationConfig(memory=memory, retrive_every=2), **GREEDY)
    output = pair.wrapped(ids(1, 9), memory=memory, output_hidden_states=True, num_items_in_batch=9)
    assert len(output.hidden_states) == 4
    options = {"output_scores": True, "low_memory": False, "suppress_tokens": [5], "return_dict_in_generate": True}
    assert len(pair.wrapped.generate(ids(1, 9), memory=memory, **GREEDY, **options).scores) == 5
