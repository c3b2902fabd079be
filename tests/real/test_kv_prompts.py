"""SmolLM2 reads a note in the middle of a chat as it reads the note's text there."""

from __future__ import annotations

import copy

import pytest
import torch

import mplus
from mplus.mechanisms.kv.chat import ChatFormat
from mplus.testing.rounding import check_close

NOTE = "I met Maria Keller again today. Maria has moved and now lives in Lisbon, close to the station."
MESSAGES = [
    {"role": "system", "content": "You are a helpful assistant of Tom. You answer in short sentences."},
    {"role": "user", "content": "Good morning! I have a few questions today."},
    {"role": "assistant", "content": "Good morning, Tom. Ask me anything."},
    {"role": "user", "content": "In which city does Maria Keller live?"},
]


def ids_of(tokenizer, messages):
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]


@pytest.fixture(scope="module")
def parts(tokenizer):
    """``[1, n]`` ids in front of the last question, and ``[1, m]`` from it on."""
    ids = ids_of(tokenizer, MESSAGES)
    begin, _ = ChatFormat.of(tokenizer).last_turn(ids[0].tolist())
    assert tokenizer.decode(ids[0, begin:]).startswith("In which city")
    return ids[:, :begin], ids[:, begin:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_note_in_the_middle_of_a_chat_is_its_text_there(decoder, tokenizer, parts, dtype):
    begin, rest = parts
    plain = copy.deepcopy(decoder).to(dtype)
    model = mplus.wrap(copy.deepcopy(plain), mplus.MPlusConfig(mechanism={"name": "kv", "begin": begin[0].tolist()}))
    memory = model.new_memory(tokenizer=tokenizer)
    memory.write(NOTE, source="diary")
    note = memory.states[0].token_ids.long()[None]
    with torch.no_grad():
        output = model(torch.cat([begin, rest], 1), memory=memory, output_sources=True)
        places = [*range(begin.shape[1]), *range(-rest.shape[1], 0)]
        text = torch.cat([begin, note, rest], 1)
        as_text, exact = (one(text).logits[:, places] for one in (plain, copy.deepcopy(plain).double()))
    assert [(one.source, one.tokens) for one in output.memory_sources[0][0]] == [("diary", note.shape[1])]
    check_close(output.logits, as_text, exact, name="logits")
    told = model.generate(torch.cat([begin, rest], 1), memory=memory, max_new_tokens=12, do_sample=False)
    assert told[0, -12:].tolist() == plain.generate(text, max_new_tokens=12, do_sample=False)[0, -12:].tolist()
    assert "Lisbon" in tokenizer.decode(told[0])


def test_it_answers_in_chats_with_other_system_text_and_goes_on(decoder, tokenizer, parts):
    """What is in front differs from what the notes were written behind; the second question is asked of the cache."""
    model = mplus.wrap(copy.deepcopy(decoder), mplus.MPlusConfig(mechanism={"name": "kv", "retrieved_chunks": 1}))
    memory = model.new_memory(tokenizer=tokenizer)
    memory.write(NOTE, source="diary")
    memory.write("Omar Petrov has a new dog. It is called Biscuit and sleeps all day long.", source="letter")
    asked = {"memory": memory, "do_sample": False, "return_dict_in_generate": True, "output_sources": True}
    ids = torch.cat(parts, 1)
    first = model.generate(ids, max_new_tokens=24, **asked)
    answer = tokenizer.decode(first.sequences[0, ids.shape[1] :], skip_special_tokens=True)
    assert "Lisbon" in answer
    question = {"role": "user", "content": "What is the name of Omar Petrov's dog?"}
    turn = ids_of(tokenizer, [MESSAGES[0], question])[:, ids_of(tokenizer, MESSAGES[:1])[0].tolist().index(2) + 1 :]
    ids = torch.cat([first.sequences, turn], 1)
    second = model.generate(ids, past_key_values=first.past_key_values, max_new_tokens=16, **asked)
    assert "Biscuit" in tokenizer.decode(second.sequences[0, ids.shape[1] :])
    assert [one.source for one in second.memory_sources[0][0]] == ["diary", "letter"]
