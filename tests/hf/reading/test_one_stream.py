"""A memory of one stream is read by every row of a batch."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, pipeline

import mplus
from mplus.errors import InputError, MemoryMismatchError
from tests.memory import tiny

if TYPE_CHECKING:
    from mplus.memory import Memory

pytestmark = pytest.mark.two_computations

TEXTS = tiny.prompts(3)
GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


def written(name: str, **options: Any) -> Memory:
    memory = tiny.variant(name).new_memory(**options)
    for part, source in enumerate(("first", "second")):
        memory.write(tiny.ids(130, seed=part), source=source)
    return memory


@torch.no_grad()
def read(memory: Memory, text: torch.Tensor, **inputs: Any) -> Any:
    return memory.engine.model(text, memory=memory, **inputs)  # type: ignore[attr-defined]


def generate(memory: Memory, text: torch.Tensor, **options: Any) -> Any:
    return memory.engine.model.generate(text, memory=memory, **{**GREEDY, **options})  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("paper", "hidden"), ("paper", "projected"), ("paper", "both"), ("published", None), ("memoryllm", None)],
)
def test_every_row_reads_what_a_row_of_its_own_would_hold(name: str, kind: str | None) -> None:
    memory = written(name, memory_rows=kind)
    found, of_their_own = read(memory, TEXTS).logits, read(memory.select([0, 0, 0]), TEXTS).logits
    assert torch.equal(found, of_their_own)
    for row, text in enumerate(TEXTS):
        torch.testing.assert_close(found[row], read(memory, text[None]).logits[0], atol=2e-5, rtol=1e-4)


def test_gradients_flow_from_every_row() -> None:
    model = tiny.build()
    memory = model.new_memory(memory_rows="hidden")
    memory.write(tiny.ids(130))
    model(TEXTS, memory=memory).logits[1].sum().backward()
    assert float(model.mplus.begin.grad.abs().sum()) > 0


def test_its_rows_are_searched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("paper", "published"):
        memory = written(name)
        retriever, seen = memory.engine.model.mplus.retriever, []  # type: ignore[attr-defined]
        select = type(retriever).select

        def listen(self: Any, layer: int, queries: Any, mask: Any, stores: Any, k: int) -> Any:
            seen.append((len(stores), len({id(store) for store in stores})))  # noqa: B023
            return select(self, layer, queries, mask, stores, k)  # noqa: B023

        monkeypatch.setattr(type(retriever), "select", listen)
        read(memory, TEXTS)
        monkeypatch.undo()
        assert seen == [(3, 1)] * 3, name


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3, "num_return_sequences": 2}, {"use_cache": False}, {"retrieve_every": 2}],
    ids=["greedy", "beams", "no cache", "retrieve_every"],
)
def test_generation_in_a_padded_batch(options: dict[str, Any]) -> None:
    memory, copies = written("paper"), options.get("num_return_sequences", 1)
    text, mask = TEXTS.clone(), torch.ones_like(TEXTS)
    text[1, :3], mask[1, :3] = 0, 0
    options = {**options, "return_dict_in_generate": True, "output_sources": True}
    found = generate(memory, text, attention_mask=mask, **options)
    for row in range(3):
        own = mask[row].bool()
        alone = generate(memory, text[row : row + 1, own], attention_mask=mask[row : row + 1, own], **options)
        for copy in range(copies):
            together = found.sequences[row * copies + copy, 7:]
            assert torch.equal(together, alone.sequences[copy, int(own.sum()) :])
        ages = [[[one.age for one in layer] for layer in sources] for sources in (found.memory_sources[row],)]
        assert ages == [[[one.age for one in layer] for layer in alone.memory_sources[0]]]
    assert len(found.memory_sources) == 3
    assert {one.source for layer in found.memory_sources[2] for one in layer} <= {"first", "second"}


def test_several_samples_of_each_prompt() -> None:
    memory = written("paper")
    torch.manual_seed(0)
    found = generate(memory, TEXTS, do_sample=True, num_return_sequences=2)
    torch.manual_seed(0)
    assert torch.equal(found, generate(memory.select([0, 0, 0]), TEXTS, do_sample=True, num_return_sequences=2))


def test_reads_of_every_row_are_noted_in_the_memory() -> None:
    memory = written("paper", eviction="lru")
    (notes,) = memory.streams.access_logs
    read(memory, TEXTS)
    own = [written("paper", eviction="lru") for _ in TEXTS]
    expected = set()
    for twin, text in zip(own, TEXTS, strict=True):
        read(twin, text[None])
        expected |= set(twin.streams.access_logs[0].layer(0).ids.tolist())
    assert set(notes.layer(0).ids.tolist()) == expected


def test_the_cache_of_one_prompt_serves_several_questions() -> None:
    memory, prompt, questions = written("paper"), tiny.prompts(1, 9), tiny.prompts(3, 4, seed=50)
    cache = DynamicCache(config=memory.engine.model.config)  # type: ignore[attr-defined]
    read(memory, prompt, past_key_values=cache)
    cache.batch_repeat_interleave(3)
    found = read(memory, questions, past_key_values=cache).logits
    for row, question in enumerate(questions):
        cache = DynamicCache(config=memory.engine.model.config)  # type: ignore[attr-defined]
        read(memory, prompt, past_key_values=cache)
        alone = read(memory, question[None], past_key_values=cache).logits[0]
        torch.testing.assert_close(found[row], alone, atol=2e-5, rtol=1e-4)


def test_several_streams_are_not_spread_over_another_batch() -> None:
    memory = tiny.variant("paper").new_memory(2)
    memory.write([tiny.ids(20), tiny.ids(20, 1)])
    for call in (read, generate):
        for rows in (1, 3, 4):
            with pytest.raises(MemoryMismatchError, match=rf"batch has {rows} rows and the memory 2: .*memory\.select"):
                call(memory, tiny.prompts(rows))


def test_there_must_be_a_text() -> None:
    memory = written("paper")
    for text in (None, torch.tensor([5, 6])):
        with pytest.raises(InputError, match=r"needs input_ids \[B, T\]"):
            read(memory, text)  # type: ignore[arg-type]


def test_a_pipeline_whose_last_batch_is_smaller() -> None:
    name = str(files("mplus") / "data" / "stories260K")
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    sizes = {"chunk_tokens": 32, "memory_tokens_per_chunk": 4, "short_term_tokens": 12, "retrieved_tokens": 6}
    model = mplus.wrap(AutoModelForCausalLM.from_pretrained(name).eval(), mplus.MPlusConfig(**sizes))
    memory = model.new_memory(tokenizer=tokenizer)
    memory.write("Once upon a time a girl named Lily found a red stone in the garden. " * 8, source="Lily")
    texts = ["Lily was", "One day a small dog", "The stone", "Tom and his", "In the garden there"]
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"max_new_tokens": 8, "do_sample": False, "memory": memory}
    found = [output[0]["generated_text"] for output in write(texts, batch_size=2, **options)]
    assert found == [write(text, **options)[0]["generated_text"] for text in texts]
    del options["memory"]
    assert found != [write(text, **options)[0]["generated_text"] for text in texts]
