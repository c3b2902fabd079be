"""What a question would bring back, and what was written from a source, without generating."""

from __future__ import annotations

import copy
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
import torch

import mplus
from mplus.errors import InputError, MemoryFullError, NotSupported
from mplus.memory import FoundText
from tests.helpers.clock import NOON, Hands
from tests.mechanisms.text.decoders import CAT, KEY, llama, tokenizer
from tests.memory.disks.plain import PlainModel, chunk

if TYPE_CHECKING:
    from pathlib import Path

DOG = "Tom has a dog and a cat."
CONFIGS = {
    "kv": {"mechanism": "kv", "chunk_tokens": 32, "retrieved_tokens": 64},
    "notes": {"mechanism": "notes", "chunk_tokens": 32},
}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest) -> Any:
    return mplus.wrap(copy.deepcopy(llama()), CONFIGS[request.param], check=False)


def filled(memory: mplus.Memory, clock: Hands) -> mplus.Memory:
    memory.write(KEY, source="garden")
    clock.move(hours=1)
    memory.write(CAT, source="house")
    memory.write(DOG, source="house")
    return memory


def test_the_best_first_with_score_source_time_and_text(model: Any) -> None:
    clock = Hands()
    memory = filled(model.new_memory(tokenizer=tokenizer(), clock=clock), clock)
    before = memory.version
    found = memory.search("Has Lily a cat?")
    assert all(isinstance(one, FoundText) for one in found)
    assert [one.source for one in found][:2] == ["house", "house"]
    assert (found[0].text or "").strip() == CAT
    assert found[0].score > found[1].score > 0
    assert found[0].written == NOON + timedelta(hours=1)
    assert memory.search("Has Lily a cat?", k=1) == found[:1]
    assert memory.search("Zebra") == []
    assert memory.version == before
    assert model.new_memory(tokenizer=tokenizer()).search("cat") == []


def test_a_search_says_what_a_read_brings_back(model: Any) -> None:
    memory = filled(model.new_memory(tokenizer=tokenizer()), Hands())
    asked = "Lily and the key"
    prompt = tokenizer()(asked, return_tensors="pt")
    output = model.generate(
        **prompt, memory=memory, max_new_tokens=1, output_sources=True, return_dict_in_generate=True
    )
    (layers,) = output.memory_sources
    scores = [score for score in dict.fromkeys(row.score for row in layers[0]) if score]
    found = memory.search(asked)
    assert sorted(scores) == pytest.approx(sorted(one.score for one in found[: len(scores)]))
    assert {row.source for row in layers[0]} <= {one.source for one in found}


def test_the_text_of_a_source(model: Any, tmp_path: Path) -> None:
    clock = Hands()
    memory = filled(model.new_memory(2, tokenizer=tokenizer(), clock=clock).select([0]), clock)
    assert memory.text("garden").strip() == KEY
    assert "".join(memory.text("house").split()) == (CAT + DOG).replace(" ", "")
    with pytest.raises(InputError, match="source must be one of this memory's sources"):
        memory.text("elsewhere")
    memory.save(tmp_path)
    assert mplus.Memory.load(tmp_path, model, tokenizer=tokenizer()).text("garden") == memory.text("garden")
    memory.replace("garden", CAT)
    assert memory.text("garden").strip() == CAT


def test_the_life_of_a_source_is_the_same(model: Any, tmp_path: Path) -> None:
    clock = Hands()
    with mplus.Memory.open(tmp_path, model, tokenizer=tokenizer(), clock=clock) as memory:
        report = memory.write(KEY, source="garden", write_id="1", expires=timedelta(days=1))
        assert memory.write(KEY, source="garden", write_id="1") == report
        memory.write(f"{CAT} {DOG}", source="house", atomic=True)
        memory.pin("house")
    clock.move(days=1)
    with mplus.Memory.open(tmp_path, model, tokenizer=tokenizer(), clock=clock) as memory:
        assert [(source.name, source.pinned) for source in memory.sources()] == [("house", True)]
        assert memory.search("key") == []


def test_pinned_chunks_of_keys_and_values_stay(tmp_path: Path) -> None:
    model = mplus.wrap(copy.deepcopy(llama()), {**CONFIGS["kv"], "long_term_tokens": 64}, check=False)
    memory = model.new_memory(tokenizer=tokenizer())
    memory.write(KEY, source="keep")
    memory.pin("keep")
    for _ in range(6):
        memory.write(f"{CAT} {DOG}", source="other")
    assert memory.text("keep").strip() == KEY
    for source in ("keep", "other"):
        with pytest.raises(MemoryFullError):  # noqa: PT012 - by one of them
            for _ in range(5):
                memory.write(KEY, source=source)


@pytest.mark.parametrize(("text", "k"), [("", 5), ("  ", 5), (7, 5), ("cat", 0), ("cat", True), ("cat", 2.5)])
def test_what_is_no_question(text: Any, k: Any) -> None:
    with pytest.raises(InputError):
        PlainModel().new_memory().search(text, k)


def test_other_mechanisms_say_that_they_cannot() -> None:
    memory = PlainModel().new_memory()
    memory.write(chunk(0), source="a")
    with pytest.raises(NotSupported, match="mechanism 'mplus' cannot be searched"):
        memory.search("cat")
    with pytest.raises(NotSupported, match="keep_text=True"):
        memory.text("a")
    kept = PlainModel().new_memory(keep_text=True)
    kept.tokenizer = tokenizer()
    kept.write(torch.cat([chunk(0), chunk(9)]), source="a")
    kept.write(chunk(5), source="b")
    assert kept.text("a") == tokenizer().decode(torch.cat([chunk(0), chunk(9)]), skip_special_tokens=True)
    kept.tokenizer = None
    with pytest.raises(InputError, match="by a tokenizer"):
        kept.text("a")
