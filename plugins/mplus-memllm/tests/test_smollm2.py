"""A small chat model that was never trained to call, where `mplus get smollm2` has brought it."""

from __future__ import annotations

from typing import Any

import pytest
from mplus_memllm import write_call
from mplus_memllm.writing import written_from_vocabulary

import mplus
from mplus.hf.pretrained.smollm2 import smollm2_folder

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(not smollm2_folder().is_dir(), reason="SmolLM2 is not in the cache folder: mplus get smollm2"),
]
FACTS = {
    "Where does Maria Keller live?": ("Maria Keller", "residence", "Lisbon"),
    "Who is the employer of Maria Keller?": ("Maria Keller", "employer", "Nokia"),
    "In which city does Ben Olsen live?": ("Ben Olsen", "residence", "Oslo"),
    "When was Ben Olsen born?": ("Ben Olsen", "birth year", "1976"),
    "Who founded Pfizer?": ("Pfizer", "founder", "Charles Erhart"),
    "Who founded Apple?": ("Apple", "founder", "Steve Jobs"),
}


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import AutoModelForCausalLM

    decoder = AutoModelForCausalLM.from_pretrained(smollm2_folder(), local_files_only=True).eval()
    return mplus.wrap(decoder, {"mechanism": {"name": "memllm", "reads": "prompt"}})


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_folder(), local_files_only=True)


def test_reads_held_to_what_is_stored_find_the_fact(model: Any, tokenizer: Any) -> None:
    memory = model.new_memory(tokenizer=tokenizer)
    for question, fact in FACTS.items():
        memory.write(write_call([fact]), source=question)
    found = 0
    for question in FACTS:
        messages = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        [[[source]]] = model(**ids, memory=memory, output_sources=True).memory_sources
        found += source.source == question
    assert found >= 5, "chance is one of six"


def test_writes_held_to_a_vocabulary_find_the_relation(model: Any, tokenizer: Any) -> None:
    ask, relations = model.mplus_engine.asking(tokenizer), ["residence", "employer", "founder", "birth year"]
    for sentence, fact in (
        ("Maria Keller lives in Lisbon.", ("Maria Keller", "residence", "Lisbon")),
        ("Ben works for Pfizer.", ("Ben", "employer", "Pfizer")),
    ):
        assert written_from_vocabulary(sentence, relations, ask, 2000) == [fact]
