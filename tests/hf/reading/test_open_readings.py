"""``with model.reading(memory):``: who reads the memory inside it, and who does not."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import functools
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import GenerationConfig, Trainer, TrainingArguments, pipeline

import mplus
from benchmarks.quality.architectures.decoders import BY_NAME
from benchmarks.quality.architectures.retrofitted import retrofit
from mplus.errors import ConfigError, MemoryMismatchError, NotSupported
from mplus.hf.pretrained.shipped import load_decoder, load_tokenizer
from tests.hf.references import TOLERANCE, error, ids

pytestmark = pytest.mark.two_computations

TEXT = ids(1, 9)
GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}


@functools.cache
def shared() -> tuple[Any, Any, Any]:
    """A decoder with two memories."""
    pair = retrofit(BY_NAME["llama"])
    return pair.wrapped, pair.memory(seed=1), pair.memory(seed=2)


def score(model: Any = None, text: Tensor = TEXT, **options: Any) -> Tensor:
    with torch.no_grad():
        return (shared()[0] if model is None else model)(text, **options).logits


def in_thread(function: Any) -> Any:
    """The result of ``function`` in a thread of its own, without this one's context."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


# ---------------------------------------------------------------- calls inside the block


def test_calls_inside_read_the_memory_and_calls_behind_do_not() -> None:
    model, memory, _ = shared()
    alone = score()
    with model.reading(memory):
        assert torch.equal(score(), score(memory=memory))
        assert torch.equal(model.generate(TEXT, **GREEDY), model.generate(TEXT, memory=memory, **GREEDY))
    assert error(score(memory=memory), alone) > 1e-3
    assert torch.equal(score(), alone)


def test_settings_of_the_block_and_of_the_call() -> None:
    model, memory, _ = shared()
    with model.reading(memory, query_tokens=2, retrieve_every=3):
        assert torch.equal(score(), score(memory=memory, query_tokens=2, retrieve_every=3))
        assert torch.equal(score(query_tokens=4), score(memory=memory, query_tokens=4, retrieve_every=3))
        inside = model.generate(TEXT, **GREEDY)
    assert torch.equal(inside, model.generate(TEXT, memory=memory, query_tokens=2, retrieve_every=3, **GREEDY))


def test_a_named_memory_wins_with_its_own_settings() -> None:
    model, memory, other = shared()
    with model.reading(memory, query_tokens=2):
        assert torch.equal(score(memory=other), in_plain(lambda: score(memory=other)))
        config = GenerationConfig(memory=other, **GREEDY)
        found = [model.generate(TEXT, memory=other, **GREEDY), model.generate(TEXT, generation_config=config)]
    expected = model.generate(TEXT, memory=other, **GREEDY)
    assert all(torch.equal(one, expected) for one in found)


def test_a_block_goes_before_the_memory_of_the_decoders_own_config(monkeypatch: pytest.MonkeyPatch) -> None:
    model, memory, other = shared()
    expected = [model.generate(TEXT, memory=one, **GREEDY) for one in (memory, None)]
    monkeypatch.setattr(model, "generation_config", copy.deepcopy(model.generation_config))
    model.generation_config.memory = other
    with model.reading(memory):
        assert torch.equal(model.generate(TEXT, **GREEDY), expected[0])
        with model.reading(None):
            assert torch.equal(model.generate(TEXT, **GREEDY), expected[1])


def in_plain(function: Any) -> Any:
    """The result of ``function`` outside of all blocks of this context."""
    return contextvars.Context().run(function)


def test_blocks_can_be_nested_and_none_is_the_decoder_alone() -> None:
    model, memory, other = shared()
    alone, first, second = score(), score(memory=memory), score(memory=other)
    with model.reading(memory):
        with model.reading(other):
            assert torch.equal(score(), second)
            with model.reading(None):
                assert torch.equal(score(), alone)
            assert torch.equal(score(), second)
        assert torch.equal(score(), first)
    assert torch.equal(score(), alone)


def test_an_exception_leaves_the_block() -> None:
    model, memory, _ = shared()
    alone = score()
    with pytest.raises(KeyError), model.reading(memory):
        raise KeyError
    assert torch.equal(score(), alone)
    assert torch.equal(in_thread(score), alone)


def test_other_decoders_do_not_read_it() -> None:
    model, memory, _ = shared()
    other = retrofit(BY_NAME["llama"], seed=3).wrapped
    alone = score(other)
    with model.reading(memory):
        assert torch.equal(score(other), alone)


def test_writes_and_copies_inside_are_those_outside() -> None:
    model, memory, _ = shared()
    expected, found = (model.new_memory(memory_rows="hidden") for _ in range(2))
    expected.write(ids(1, 40)[0])
    alone = score()
    with model.reading(memory):
        found.write(ids(1, 40)[0])
        twin = copy.deepcopy(model)
        revived = pickle.loads(pickle.dumps(model))
        assert torch.equal(score(twin), alone)
        assert torch.equal(score(revived), alone)
    for a, b in zip(found.states[0].stm, expected.states[0].stm, strict=True):
        assert torch.equal(a.birth, b.birth)
        assert torch.equal(
            a.hidden if a.hidden is not None else a.projected, b.hidden if b.hidden is not None else b.projected
        )


def test_one_stream_is_read_by_batches_of_any_size() -> None:
    model, memory, _ = shared()
    text = ids(5, 9)
    with model.reading(memory):
        found = [score(text=part) for part in (text[:4], text[4:])]
    expected = [score(text=row[None], memory=memory) for row in text]
    assert error(torch.cat(found), torch.cat(expected)) < TOLERANCE


@pytest.mark.parametrize(
    ("options", "raised", "message"),
    [
        ({"query_tokens": 0}, ConfigError, "query_tokens must be a whole number of at least 1"),
        ({"retrieve_every": 0}, ConfigError, "retrieve_every must be a whole number of at least 1"),
        ({"memory": 7}, MemoryMismatchError, "memory must be an mplus.Memory, got int"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_block_that_cannot_be_is_refused_at_its_door(options: dict[str, Any], raised: Any, message: str) -> None:
    model, memory, _ = shared()
    with pytest.raises(raised, match=message), model.reading(**{"memory": memory, **options}):
        pass


def test_a_memory_of_another_decoder_is_refused_at_the_door() -> None:
    _, memory, _ = shared()
    other = retrofit(BY_NAME["llama"], seed=3).wrapped
    with pytest.raises(MemoryMismatchError, match="belongs to another model"), other.reading(memory):
        pass


def test_continuous_batching_inside_is_refused() -> None:
    model, memory, _ = shared()
    with pytest.raises(NotSupported, match="generate_batch"), model.reading(memory):
        model.generate_batch([[5, 6]])


# ---------------------------------------------------------------- threads, tasks, generators


def test_another_thread_is_told() -> None:
    model, memory, other = shared()
    with model.reading(memory):
        for call in (score, lambda: model.generate(TEXT, **GREEDY)):
            with pytest.raises(NotSupported, match=r"another thread is in `with model.reading"):
                in_thread(call)
        assert torch.equal(in_thread(lambda: score(memory=other)), score(memory=other))

        def in_a_block_of_its_own() -> Tensor:
            with model.reading(None):
                return score()

        alone = in_thread(in_a_block_of_its_own)
    assert torch.equal(alone, score())
    assert torch.equal(in_thread(score), alone)


def test_threads_read_it_where_that_is_asked_for() -> None:
    model, memory, _ = shared()
    with model.reading(memory, threads=True):
        assert torch.equal(in_thread(score), score(memory=memory))
        with model.reading(None), pytest.raises(NotSupported):
            in_thread(score)  # the innermost block counts


def test_two_threads_in_blocks_of_their_own() -> None:
    model, memory, other = shared()
    both = threading.Barrier(2)

    def reads(one: Any) -> Tensor:
        with model.reading(one, threads=True):
            both.wait(60)
            found = score()
            both.wait(60)
            return found

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(reads, (memory, other)))
    for logits, one in zip(found, (memory, other), strict=True):
        assert torch.equal(logits, score(memory=one))


def test_tasks_read_what_their_own_blocks_say() -> None:
    model, memory, other = shared()

    async def reads(one: Any) -> Tensor:
        with model.reading(one):
            await asyncio.sleep(0)
            found = await asyncio.to_thread(score)  # which hands the context on
            await asyncio.sleep(0)
            assert torch.equal(score(), found)
            return found

    async def plain() -> Tensor:
        await asyncio.sleep(0)
        return score()

    async def together() -> list[Tensor]:
        return await asyncio.gather(reads(memory), plain(), reads(other))

    first, alone, second = asyncio.run(together())
    assert torch.equal(first, score(memory=memory))
    assert torch.equal(second, score(memory=other))
    assert torch.equal(alone, score())


def test_generators_that_end_in_any_order() -> None:
    model, memory, other = shared()
    alone = score()

    def reads(one: Any) -> Iterator[Tensor]:
        with model.reading(one):
            yield score()
            yield score()

    first, second = reads(memory), reads(other)
    assert torch.equal(next(first), score(memory=memory))
    assert torch.equal(next(second), score(memory=other))
    first.close()
    assert torch.equal(next(second), score(memory=other))
    in_thread(second.close)  # finalised elsewhere
    assert torch.equal(score(), alone)
    assert torch.equal(in_thread(score), alone)


# ---------------------------------------------------------------- callers that know no memory


@functools.cache
def storyteller() -> tuple[Any, Any, Any]:
    tokenizer = load_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    sizes = {"chunk_tokens": 48, "memory_tokens_per_chunk": 4, "short_term_tokens": 8, "retrieved_tokens": 4}
    model = mplus.wrap(
        load_decoder(), mplus.MPlusConfig(**sizes, retriever={"name": "linear", "width": 8}), check=False
    )
    memory = model.new_memory(tokenizer=tokenizer)
    memory.write("Once upon a time there was a little girl who lived near the sea with her dog Tim. " * 4)
    return model, tokenizer, memory


def test_a_pipeline_and_its_last_smaller_batch() -> None:
    model, tokenizer, memory = storyteller()
    prompts = ["Tim ran", "The dog saw a", "One day"]
    talk = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    with model.reading(memory):
        found = [one[0]["generated_text"] for one in talk(prompts, batch_size=2, **options)]
    alone = [one[0]["generated_text"] for one in talk(prompts, batch_size=2, **options)]
    expected = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, memory=memory, max_new_tokens=6, do_sample=False)
        expected.append(tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))
    assert found == expected
    assert found != alone


def test_evaluation_by_a_trainer_and_a_peft_model_around(tmp_path: Any) -> None:
    wrapped = retrofit(BY_NAME["llama"]).wrapped
    memory = wrapped.new_memory()
    memory.write(ids(1, 60, seed=3)[0])
    text = ids(3, 9)
    expected = wrapped(text, labels=text, memory=memory, query_tokens=3).loss.detach()
    model = get_peft_model(wrapped, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    data = Dataset.from_list([{"input_ids": row, "labels": row} for row in text.tolist()])
    settings = TrainingArguments(
        str(tmp_path), per_device_eval_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = Trainer(model, settings, eval_dataset=data)
    with model.reading(memory, query_tokens=3):
        loss = trainer.evaluate()["eval_loss"]
        assert error(model(text).logits.detach(), wrapped(text, memory=memory, query_tokens=3).logits) < TOLERANCE
    assert loss == pytest.approx(expected.item(), abs=TOLERANCE)
    assert trainer.evaluate()["eval_loss"] != pytest.approx(loss, abs=1e-3)
