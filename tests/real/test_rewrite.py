"""Notes that a small decoder was told are found by SmolLM2, which has another size and another tokenizer."""

from __future__ import annotations

import copy

import mplus
from mplus.hf.pretrained.shipped import load_decoder, load_tokenizer

NOTES = {
    "garden": "The key to the shed is under the blue stone in the garden.",
    "pets": "Tom's dog is called Biscuit and sleeps on the sofa.",
    "diary": "Lily has her piano lesson on Thursday at five.",
}
QUESTIONS = {
    "Where is the key to the shed?": "garden",
    "What is Tom's dog called?": "pets",
    "When is Lily's piano lesson?": "diary",
}


def test_a_memory_goes_on_with_a_larger_decoder(decoder, tokenizer, tmp_path):
    small = mplus.wrap(load_decoder(), {"mechanism": "kv"}, tokenizer=load_tokenizer())
    memory = small.new_memory()
    for name, note in NOTES.items():
        memory.write(note, source=name, write_id=name)
    memory.save(tmp_path / "old")
    model = mplus.wrap(copy.deepcopy(decoder), {"mechanism": "kv"}, tokenizer=tokenizer)
    new = mplus.rewrite_memory(tmp_path / "old", model, tmp_path / "new", old_tokenizer=load_tokenizer())
    assert {name: new.text(name) for name in NOTES} == NOTES
    assert {question: new.search(question)[0].source for question in QUESTIONS} == QUESTIONS
    told = model.new_memory()
    told.write("It is cold in here today.", source="today")
    told.merge(new)
    assert {question: told.search(question)[0].source for question in QUESTIONS} == QUESTIONS
