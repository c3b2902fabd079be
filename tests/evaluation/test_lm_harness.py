"""lm-evaluation-harness with a memory: every row is scored as ``forward`` scores it alone, whatever the batch."""

from __future__ import annotations

import functools
import sys
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from peft import LoraConfig, PromptTuningConfig, get_peft_model

import mplus
from mplus.errors import ConfigError, InputError, MemoryMismatchError, MissingDependencyError
from mplus.evaluation.lm_harness import MemoryLM
from mplus.hf.pretrained.shipped import load_decoder, load_tokenizer
from tests.hf.references import TOLERANCE

pytestmark = pytest.mark.two_computations

PAIRS = [
    ("Once upon a time there was a girl", " who lived near the sea with her dog"),
    ("The dog of the girl was called", " Tim"),
    ("The dog of the girl was called", " Tom and he was very big"),
    ("The dog", " of the girl was called Tom and he was very big"),  # the same text, with less of it as context
    ("", "Tim ran to the beach"),
    ("She said:", " no no no no"),
]
NOISE = 16 * 2 * TOLERANCE
"""Between two sums of at most 16 log-probabilities, each of one logit and of the logarithm of a sum."""
TEXT = "Tim ran to the beach and saw a big red ball. He wanted to play with it. " * 2


@functools.cache
def parts() -> tuple[Any, Any, Any]:
    sizes = {"chunk_tokens": 48, "memory_tokens_per_chunk": 4, "short_term_tokens": 8, "retrieved_tokens": 4}
    config = mplus.MPlusConfig(**sizes, retriever={"name": "linear", "width": 8})
    model, tokenizer = mplus.wrap(load_decoder(), config, check=False), load_tokenizer()
    memory = model.new_memory(tokenizer=tokenizer)
    memory.write("Once upon a time there was a little girl who lived near the sea with her dog Tim. " * 8)
    return model, tokenizer, memory


def lm(batch_size: Any = 4, **options: Any) -> MemoryLM:
    model, tokenizer, memory = parts()
    return MemoryLM(model, memory, tokenizer=tokenizer, batch_size=batch_size, **options)


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, one, place) for place, one in enumerate(arguments)]


def encoded(one: MemoryLM, context: str, continuation: str) -> tuple[list[int], list[int]]:
    if not context:
        return [one.prefix_token_id], one.tok_encode(continuation, add_special_tokens=False)
    return one._encode_pair(context, continuation)


def directly(context: list[int], continuation: list[int], **options: Any) -> tuple[float, bool]:
    """One row by ``forward``."""
    model, _, memory = parts()
    text = torch.tensor([context + continuation])
    with torch.no_grad():
        logits = model(text, memory=memory, query_tokens=len(context), **options).logits[0, len(context) - 1 : -1]
    chosen = logits.log_softmax(-1).gather(-1, text[0, len(context) :, None])
    return float(chosen.sum()), logits.argmax(-1).tolist() == continuation


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("every", [None, 3])
def test_log_likelihoods_are_those_of_every_row_alone(batch_size: int, every: int | None) -> None:
    one = lm(batch_size, retrieve_every=every)
    found = one.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True)
    for (likelihood, greedy), pair in zip(found, PAIRS, strict=True):
        expected = directly(*encoded(one, *pair), retrieve_every=every)
        assert likelihood == pytest.approx(expected[0], abs=NOISE)
        assert greedy == expected[1]


def test_a_continuation_does_not_retrieve() -> None:
    one = lm()
    context, continuation = encoded(one, *PAIRS[2])
    ((likelihood, _),) = one.loglikelihood(instances("loglikelihood", PAIRS[2:3]), disable_tqdm=True)
    model, _, memory = parts()
    text = torch.tensor([context + continuation])
    with torch.no_grad():
        leaking = model(text, memory=memory).logits[0, len(context) - 1 : -1].log_softmax(-1)
    assert abs(float(leaking.gather(-1, text[0, len(context) :, None]).sum()) - likelihood) > 1e-2


def test_answers_that_share_their_context_are_read_once() -> None:
    one, rows = lm(), []
    count = one._decoder.get_input_embeddings().register_forward_hook(lambda _, args, __: rows.append(args[0].shape[0]))
    choices = [("The dog was called", choice) for choice in (" T", " S", " B")]
    try:
        found = one.loglikelihood(instances("loglikelihood", choices), disable_tqdm=True)
    finally:
        count.remove()
    assert rows == [1]
    assert [likelihood for likelihood, _ in found] == pytest.approx(
        [directly(*encoded(one, *pair))[0] for pair in choices], abs=NOISE
    )


@pytest.mark.parametrize("batch_size", [1, 4])
def test_texts_without_context_retrieve_as_they_go(batch_size: int) -> None:
    one = lm(batch_size, rolling_retrieve_every=5, max_length=20)
    found = one.loglikelihood_rolling(instances("loglikelihood_rolling", [(TEXT,), ("Tim ran.",)]), disable_tqdm=True)
    for total, text in zip(found, (TEXT, "Tim ran."), strict=True):
        tokens, expected, before = one.tok_encode(text), 0.0, [one.prefix_token_id]
        for start in range(0, len(tokens) - len(tokens) % 20, 20):
            expected += directly(before, tokens[start : start + 20], retrieve_every=5)[0]
            before = tokens[start + 19 : start + 20]
        rest = len(tokens) % 20
        if rest:  # the last window is filled from the left, and only its end is scored
            context = ([one.prefix_token_id, *tokens])[-21:-rest]
            expected += directly(context, tokens[-rest:], retrieve_every=5)[0]
        assert total == pytest.approx(expected, abs=5 * NOISE)
    assert one.retrieve_every is None
    assert one._every is None


@pytest.mark.parametrize("every", [None, 2])
def test_answers_are_generated_with_the_memory(every: int | None) -> None:
    model, tokenizer, memory = parts()
    prompts = ["Tim ran", "One day the little girl saw a"]
    arguments = [(prompt, {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}) for prompt in prompts]
    found = lm(2, retrieve_every=every).generate_until(instances("generate_until", arguments), disable_tqdm=True)
    for text, prompt in zip(found, prompts, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        options = {"memory": memory, "retrieve_every": every, "max_new_tokens": 6, "do_sample": False}
        expected = tokenizer.decode(model.generate(**inputs, **options)[0, inputs.input_ids.shape[1] :])
        assert text == expected.split("\n")[0]


def test_the_largest_batch_is_found_with_the_memory() -> None:
    one = lm("auto", max_batch_size=2)
    found = one.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True)
    expected = [directly(*encoded(one, *pair))[0] for pair in PAIRS]
    assert [likelihood for likelihood, _ in found] == pytest.approx(expected, abs=NOISE)


def test_a_long_context_loses_its_beginning() -> None:
    one = lm(max_length=12)
    context, continuation = encoded(one, TEXT, " Tim")
    ((likelihood, _),) = one.loglikelihood(instances("loglikelihood", [(TEXT, " Tim")]), disable_tqdm=True)
    kept = (context + continuation)[-13:]
    expected = directly(kept[: -len(continuation)], continuation)[0]
    assert likelihood == pytest.approx(expected, abs=NOISE)


def test_prompt_tuning_around_the_decoder() -> None:
    tokenizer = parts()[1]
    decoder = mplus.wrap(load_decoder(), mplus.MPlusConfig(chunk_tokens=48, retriever={"name": "linear", "width": 8}))
    memory = decoder.new_memory(tokenizer=tokenizer)
    memory.write("Once upon a time there was a little girl who lived near the sea with her dog Tim. " * 4)
    model = get_peft_model(decoder, PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")).eval()
    one = MemoryLM(model, memory, tokenizer=tokenizer, batch_size=3)
    found = one.loglikelihood(instances("loglikelihood", PAIRS[:3]), disable_tqdm=True)
    for (likelihood, _), pair in zip(found, PAIRS, strict=False):
        context, continuation = encoded(one, *pair)
        text = torch.tensor([context + continuation])
        with torch.no_grad():
            logits = model(input_ids=text, memory=memory, query_tokens=3 + len(context)).logits[0, 3:]
        chosen = logits[len(context) - 1 : -1].log_softmax(-1).gather(-1, text[0, len(context) :, None])
        assert likelihood == pytest.approx(float(chosen.sum()), abs=NOISE)


def test_a_peft_model_around_the_decoder() -> None:
    pair = mplus.wrap(
        load_decoder(), mplus.MPlusConfig(chunk_tokens=48, retriever={"name": "linear", "width": 8}), check=False
    )
    memory = pair.new_memory(tokenizer=parts()[1])
    memory.write("Once upon a time there was a little girl who lived near the sea with her dog Tim. " * 4)
    before = MemoryLM(pair, memory, tokenizer=parts()[1]).loglikelihood(instances("x", PAIRS[:1]), disable_tqdm=True)
    model = get_peft_model(pair, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    after = MemoryLM(model, memory, tokenizer=parts()[1]).loglikelihood(instances("x", PAIRS[:1]), disable_tqdm=True)
    assert after[0][0] == pytest.approx(before[0][0], abs=NOISE)


def test_what_is_refused() -> None:
    model, _, memory = parts()
    with pytest.raises(InputError, match="pretrained must be a wrapped decoder, got 'gpt2'"):
        MemoryLM("gpt2", memory)
    with pytest.raises(InputError, match=r"memory must be an mplus\.Memory of one stream"):
        MemoryLM(model, memory.select([0, 0]))
    with pytest.raises(MemoryMismatchError, match="belongs to another model"):
        MemoryLM(load_decoder(), memory)
    with pytest.raises(ConfigError, match="retrieve_every must be a whole number of at least 1"):
        lm(rolling_retrieve_every=0)
    with pytest.raises(InputError, match="a request must have a context and a continuation"):
        lm()._loglikelihood_tokens([(None, [], [5])])


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "mplus.evaluation.lm_harness")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingDependencyError, match=r"needs the package 'lm_eval'.*pip install 'mplus\[lm-eval\]'"):
        __import__("mplus.evaluation.lm_harness")
