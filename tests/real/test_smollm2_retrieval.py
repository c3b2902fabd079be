"""A real chat model finds what it was told without training, and knows what it was not told."""

from __future__ import annotations

import pytest

import mplus

NOTES = {
    "bike": "My bicycle is locked behind the bakery; the code is 4417.",
    "tea": "Eleanor Marsh drinks nothing but jasmine tea since she came back from Taipei.",
    "leak": "The plumber fixed the leak under the sink on Tuesday.",
    "flight": "Our flight to Bergen leaves at six in the morning from gate B12.",
    "old day": "The meeting is on Monday at nine.",
    "new day": "The meeting is on Thursday at nine.",
    "old job": "Victor Hale works as a baker.",
    "new job": "Victor Hale works as a surveyor now.",
    "code": "The code of the garage is 2206.",
    "other code": "The code of the cellar is 9031.",
}


@pytest.fixture(scope="module")
def memory(folder, tokenizer):
    from transformers import AutoModelForCausalLM

    decoder = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    memory = mplus.wrap(decoder, {"mechanism": "kv"}, check=False).new_memory(tokenizer=tokenizer)
    for source, text in NOTES.items():
        memory.write(text, source)
    return memory


@pytest.mark.parametrize(
    ("question", "source"),
    [
        ("What is the code of my bicycle lock?", "bike"),
        ("What does Eleanor Marsh like to drink?", "tea"),
        ("When does our flight leave? Answer with one short sentence.", "flight"),
        ("When is the meeting?", "new day"),
        ("What does Victor Hale work as?", "new job"),
        ("What is the code of the garage?", "code"),
    ],
)
def test_the_right_note_is_the_best(memory, question: str, source: str) -> None:
    assert memory.search(question, 1)[0].source == source


@pytest.mark.parametrize("question", ["Who painted the Mona Lisa?", "How many moons does Jupiter have?"])
def test_nothing_comes_back_where_nothing_was_told(memory, question: str) -> None:
    assert memory.search(question, 3) == []


# The last one: it takes the memory's decoder.
def test_nothing_has_to_be_found_out_of_it_first(memory, tmp_path, monkeypatch: pytest.MonkeyPatch, tokenizer) -> None:
    monkeypatch.setenv("MPLUS_CACHE", str(tmp_path))
    decoder = mplus.unwrap(memory.engine.model)
    mplus.wrap(decoder, {"mechanism": "kv"}, check=False).new_memory(tokenizer=tokenizer)
    assert not list(tmp_path.iterdir()), "its calibration comes with mplus"
