"""``retrieve_every`` of ``forward``: a text is scored as a generation that was made to say it would have scored it."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import mplus
from benchmarks.quality.architectures.decoders import BY_NAME
from benchmarks.quality.architectures.retrofitted import SIZES, Pair, retrofit
from mplus.errors import ConfigError, InputError, NotSupported
from mplus.hf.pretrained.shipped import load_decoder, load_tokenizer
from tests.hf.reading.test_query_tokens import padded
from tests.hf.references import TOLERANCE, error, ids, stir

pytestmark = pytest.mark.two_computations

TEXT = ids(1, 17)


@functools.cache
def shared(name: str = "llama") -> tuple[Pair, Any]:
    pair = retrofit(BY_NAME[name])
    stir(pair.wrapped)
    return pair, pair.memory()


def forced(model: Any, text: Tensor, prompt: int, memory: Any, **options: Any) -> Tensor:
    """``[1, T - prompt + 1, V]``: logits of a generation that may only say ``text``, from the last of its prompt on."""
    after = text.shape[1] - prompt + 1
    said = [*text[0].tolist(), 5]
    output = model.generate(
        text[:, :prompt],
        memory=memory,
        prefix_allowed_tokens_fn=lambda _, sofar: [said[len(sofar)]],
        max_new_tokens=after,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return torch.stack(output.logits, 1)


def score(text: Tensor, name: str = "llama", **options: Any) -> Tensor:
    pair, memory = shared(name)
    with torch.no_grad():
        return pair.wrapped(text, memory=memory, **options).logits


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral-sliding", "falcon-new"])
@pytest.mark.parametrize(("prompt", "every"), [(1, 4), (6, 1), (6, 3), (6, 40)])
def test_scores_are_those_of_a_generation_that_says_the_text(name: str, prompt: int, every: int) -> None:
    pair, memory = shared(name)
    expected = forced(pair.wrapped, TEXT, prompt, memory, retrieve_every=every)
    found = score(TEXT, name, query_tokens=prompt, retrieve_every=every)
    assert found.shape[:2] == TEXT.shape
    assert error(found[:, prompt - 1 :], expected) < TOLERANCE
    if every < 5:
        assert error(found, score(TEXT, name, query_tokens=prompt)) > 1e-3


def test_without_query_tokens_the_first_token_retrieves_first() -> None:
    assert torch.equal(score(TEXT, retrieve_every=4), score(TEXT, retrieve_every=4, query_tokens=1))


def test_no_score_knows_what_comes_behind_it() -> None:
    changed = TEXT.clone()
    changed[:, 10:] = ids(1, 7, seed=9)
    a, b = (score(text, retrieve_every=3) for text in (TEXT, changed))
    assert error(a[:, :10], b[:, :10]) < TOLERANCE
    assert error(a[:, 10:], b[:, 10:]) > 1e-3


@pytest.mark.parametrize(("side", "counts"), [("left", [6, 2, 3]), ("right", [3, 2, 1])])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_row_of_a_batch_is_cut_for_itself(side: str, counts: list[int], name: str) -> None:
    rows = [ids(1, 17, seed=1), ids(1, 11, seed=2), ids(1, 14, seed=3)]
    text, mask = padded(rows, side)
    found = score(text, name, attention_mask=mask, query_tokens=counts, retrieve_every=4)
    for row, (alone, count) in enumerate(zip(rows, counts, strict=True)):
        expected = score(alone, name, query_tokens=count, retrieve_every=4)
        assert error(found[row][mask[row].bool()], expected[0]) < TOLERANCE


def test_contexts_of_a_batch_must_be_read_before_a_row_retrieves_anew() -> None:
    with pytest.raises(InputError, match="one does so in column 5, and those of another one end in column 6"):
        score(ids(2, 17), query_tokens=[7, 2], retrieve_every=4)


@pytest.mark.parametrize("split", [3, 8, 9])
def test_a_cache_goes_on_where_it_stopped(split: int) -> None:
    pair, memory = shared()
    options: dict[str, Any] = {"memory": memory, "query_tokens": 2, "retrieve_every": 4}
    with torch.no_grad():
        first = pair.wrapped(TEXT[:, :split], **options)
        second = pair.wrapped(TEXT[:, split:], past_key_values=first.past_key_values, **options)
    expected = score(TEXT, query_tokens=2, retrieve_every=4)
    assert error(torch.cat([first.logits, second.logits], 1), expected) < TOLERANCE
    assert second.past_key_values.get_seq_length() == TEXT.shape[1]


def test_a_generation_goes_on_where_a_scored_text_stopped() -> None:
    pair, memory = shared()
    with torch.no_grad():
        cache = pair.wrapped(TEXT[:, :7], memory=memory, query_tokens=3, retrieve_every=3).past_key_values
    found = forced(pair.wrapped, TEXT, 8, memory, retrieve_every=3, past_key_values=cache)
    assert error(found, score(TEXT, query_tokens=3, retrieve_every=3)[:, 7:]) < TOLERANCE


def test_a_copied_cache_goes_on_by_itself() -> None:
    pair, memory = shared()
    options: dict[str, Any] = {"memory": memory, "query_tokens": 2, "retrieve_every": 4}
    with torch.no_grad():
        cache = pair.wrapped(TEXT[:, :8], **options).past_key_values
        twin = copy.deepcopy(cache)
        a = pair.wrapped(TEXT[:, 8:], past_key_values=cache, **options).logits
        b = pair.wrapped(TEXT[:, 8:], past_key_values=twin, **options).logits
    assert torch.equal(a, b)


def test_embeddings_and_every_part_of_an_output() -> None:
    pair, memory = shared()
    embedded = pair.wrapped.get_input_embeddings()(TEXT).detach()
    options: dict[str, Any] = {"memory": memory, "query_tokens": 3, "retrieve_every": 4}
    with torch.no_grad():
        a = pair.wrapped(inputs_embeds=embedded, **options, output_hidden_states=True, output_sources=True)
        b = pair.wrapped(TEXT, **options, logits_to_keep=2, use_cache=False)
        c = pair.wrapped(TEXT, **options, return_dict=False)
    assert error(a.logits, score(TEXT, query_tokens=3, retrieve_every=4)) < TOLERANCE
    assert [state.shape[:2] for state in a.hidden_states] == [TEXT.shape] * 4
    assert len(a.memory_sources[0]) == 3
    assert torch.equal(b.logits, c[0][:, -2:])
    assert b.past_key_values is None


def test_loss_is_that_of_the_whole_text() -> None:
    pair, memory = shared()
    with torch.no_grad():
        output = pair.wrapped(TEXT, memory=memory, labels=TEXT, retrieve_every=4)
        summed = pair.wrapped(TEXT, memory=memory, labels=TEXT, retrieve_every=4, num_items_in_batch=4)
    expected = cross_entropy(output.logits[0, :-1], TEXT[0, 1:])
    assert float(output.loss) == pytest.approx(float(expected), abs=TOLERANCE)
    assert float(summed.loss) == pytest.approx(float(expected) * 4, abs=10 * TOLERANCE)  # of 16 predicted tokens


def test_gradients_are_those_of_the_scores() -> None:
    """Against a central difference in float64, along a random direction of the adapter that reads."""
    pair = retrofit(BY_NAME["gpt2"])  # which computes nothing in float32 then
    sizes = mplus.MPlusConfig.from_dict({**SIZES, "memory_rows": "hidden"})
    model = stir(mplus.wrap(mplus.unwrap(pair.wrapped).double(), sizes))
    memory = model.new_memory()
    memory.write(ids(1, 72, seed=5)[0])

    def loss(**options: Any) -> Tensor:
        return cross_entropy(model(TEXT, memory=memory, **options).logits[0, :-1], TEXT[0, 1:])

    trained = [one for name, one in model.named_parameters() if ".lora_" in name and ".read." in name]
    generator = torch.Generator().manual_seed(3)
    direction = [torch.randn(one.shape, generator=generator, dtype=one.dtype) for one in trained]
    slopes = {}
    for every in (4, 100):
        found = torch.autograd.grad(loss(retrieve_every=every), trained)
        slopes[every] = sum(float((one * way).sum()) for one, way in zip(found, direction, strict=True))
    expected, step = 0.0, 1e-6
    with torch.no_grad():
        for move, sign in ((1, 1), (-2, -1)):
            for weight, way in zip(trained, direction, strict=True):
                weight.add_(way, alpha=move * step)
            expected += sign * float(loss(retrieve_every=4)) / (2 * step)
    assert abs(slopes[4] - slopes[100]) > 1e-3
    assert slopes[4] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"output_attentions": True}, "output_attentions"),
        ({"attention_mask": torch.ones(1, 1, 17, 17, dtype=torch.bool).tril()}, "attention_mask"),
        ({"pixel_values": torch.zeros(1)}, "pixel_values"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_by_name(options: dict[str, Any], named: str) -> None:
    with pytest.raises(NotSupported, match=f"retrieve_every reads a text in pieces .* {named}"):
        score(TEXT, retrieve_every=4, **options)


def test_gradient_checkpointing_keeps_no_cache() -> None:
    pair = retrofit(BY_NAME["llama"])
    pair.wrapped.gradient_checkpointing_enable()
    pair.wrapped.train()
    memory = pair.wrapped.new_memory()
    with pytest.raises(NotSupported, match="gradient checkpointing"):
        pair.wrapped(TEXT, memory=memory, labels=TEXT, retrieve_every=4)


@pytest.mark.parametrize("value", [0, 1.5, True, "2"])
def test_retrieve_every_must_be_a_count(value: Any) -> None:
    with pytest.raises(ConfigError, match="retrieve_every must be a whole number of at least 1"):
        score(TEXT, retrieve_every=value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_shipped_decoder_scores_a_story_as_it_would_say_it(dtype: torch.dtype) -> None:
    model, tokenizer = load_decoder().to(dtype), load_tokenizer()
    sizes = {"chunk_tokens": 48, "memory_tokens_per_chunk": 4, "short_term_tokens": 8, "retrieved_tokens": 4}
    config = mplus.MPlusConfig(**sizes, retriever={"name": "linear", "width": 8})
    mplus.wrap(model, config, check=dtype == torch.float32)
    memory = model.new_memory(tokenizer=tokenizer)
    memory.write("Once upon a time there was a little girl who lived near the sea with her dog Tim. " * 6)
    text = tokenizer("Tim ran to the beach and saw a big red ball.", return_tensors="pt").input_ids
    expected = forced(model, text, 4, memory, retrieve_every=5)
    with torch.no_grad():
        found = model(text, memory=memory, query_tokens=4, retrieve_every=5).logits
    # A token alone and tokens together are two computations: in bfloat16 they differ by its rounding, of 2 ** -8.
    assert error(found[:, 3:].float(), expected.float()) < (TOLERANCE if dtype == torch.float32 else 0.1)
