"""SmolLM2-135M-Instruct: converted as it should be, and with an untrained memory of keys and values."""

from __future__ import annotations

import copy

import pytest
import torch

import mplus
from mplus.testing.rounding import check_close

NOTE = "I met Maria Keller again today. Maria has moved and now lives in Lisbon, close to the station."
QUESTION = "In which city does Maria Keller live?"


def chat(tokenizer, question):
    messages = [{"role": "user", "content": question}]
    found = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return found["input_ids"]


def answer(model, tokenizer, ids, **options):
    told = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False, **options
    )
    return tokenizer.decode(told[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def opening(tokenizer):
    """The ids that every question begins with: system text, and the opening of the user's turn."""
    one, other = (chat(tokenizer, text)[0].tolist() for text in ("A", "B"))
    shared = next(place for place, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
    return one[:shared]


@pytest.fixture(scope="module")
def wrapped(decoder, opening):
    return mplus.wrap(copy.deepcopy(decoder), mplus.MPlusConfig(mechanism={"name": "kv", "begin": opening}))


def test_it_is_the_chat_model_it_says(decoder, tokenizer):
    config = decoder.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_key_value_heads) == (30, 576, 3)
    assert decoder.dtype == torch.float32
    assert "Paris" in answer(decoder, tokenizer, chat(tokenizer, "What is the capital of France?"))


def test_an_empty_memory_leaves_it_as_it_is(decoder, wrapped, tokenizer):
    ids = chat(tokenizer, QUESTION)
    assert torch.equal(wrapped(ids, memory=wrapped.new_memory(tokenizer=tokenizer)).logits, decoder(ids).logits)


def test_it_answers_from_a_note_after_a_restart(decoder, wrapped, tokenizer, opening, tmp_path):
    rest = chat(tokenizer, QUESTION)[:, len(opening) :]
    assert "Lisbon" not in answer(decoder, tokenizer, chat(tokenizer, QUESTION))
    with mplus.Memory.open(tmp_path / "memory", wrapped, tokenizer=tokenizer) as memory:
        memory.write(NOTE, source="diary")
    with mplus.Memory.open(tmp_path / "memory", wrapped, tokenizer=tokenizer) as memory:
        assert "Lisbon" in answer(wrapped, tokenizer, rest, memory=memory)
        memory.forget("diary")
        assert "Lisbon" not in answer(wrapped, tokenizer, rest, memory=memory)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_note_alone_is_as_good_as_its_text(decoder, tokenizer, opening, wrapped, dtype):
    """[opening | note | rest], with the note written and brought back, and read as one text."""
    note = tokenizer(NOTE, return_tensors="pt", add_special_tokens=False)["input_ids"]
    rest = chat(tokenizer, QUESTION)[:, len(opening) :]
    text = torch.cat([torch.tensor([opening]), note, rest], 1)
    exact = copy.deepcopy(decoder).double()(text).logits[:, -rest.shape[1] :]
    model = wrapped
    if dtype != torch.float32:
        config = mplus.MPlusConfig(mechanism={"name": "kv", "begin": opening})
        model = mplus.wrap(copy.deepcopy(decoder).to(dtype), config)
        exact = copy.deepcopy(decoder).to(dtype).double()(text).logits[:, -rest.shape[1] :]
    plain = copy.deepcopy(decoder).to(dtype)(text).logits[:, -rest.shape[1] :]
    memory = model.new_memory(tokenizer=tokenizer)
    memory.write(note, source="diary")
    with torch.no_grad():
        found = model(rest, memory=memory).logits
    check_close(found, plain, exact, name="logits")


def test_notes_are_written_behind_the_default_system_text_and_cut_behind_sentences(decoder, tokenizer):
    model = mplus.wrap(copy.deepcopy(decoder), {"mechanism": "kv", "chunk_tokens": 26, "retriever": "words"})
    memory = model.new_memory(tokenizer=tokenizer)
    memory.write(f"{NOTE} {NOTE}", source="diary")
    memory.write("Yes.", source="diary")
    (state,) = memory.states
    begin = tokenizer.decode(state.begin_ids)
    assert begin.startswith("<|im_start|>system\nYou are a helpful AI assistant")
    assert begin.endswith("<|im_start|>user\n")
    chunks = [tokenizer.decode(ids) for ids in state.token_ids.split(state.chunk_length.tolist())]
    assert [chunk.strip() for chunk in chunks] == [NOTE, NOTE, "Yes."]
