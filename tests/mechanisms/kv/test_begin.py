"""What chunks are written behind: found from a chat template once, and kept with the memory."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch

import mplus
from mplus.errors import ConfigError, MemoryMismatchError
from mplus.mechanisms.kv.chat import ChatFormat
from mplus.mechanisms.kv.state import TABLE
from mplus.memory.format.repair import repair
from tests.mechanisms.kv.memories import PLAIN, WITH_SYSTEM, decoder, logits, text, tokenizer, wrapped
from tests.memory import tiny

if TYPE_CHECKING:
    from pathlib import Path

    from mplus.mechanisms.kv.state import KvState

HIDING = "{% for m in messages %}{{ m.content | length }}{% endfor %}"


def rendered(tokenizer: Any, *contents: str) -> list[int]:
    roles = ("user", "assistant")
    messages = [{"role": roles[place % 2], "content": content} for place, content in enumerate(contents)]
    told = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    found: list[int] = tokenizer(told, add_special_tokens=False)["input_ids"]
    return found


@pytest.mark.parametrize("template", [PLAIN, WITH_SYSTEM], ids=["plain", "system"])
def test_the_parts_of_a_prompt_are_those_the_template_makes(template: str) -> None:
    made = tokenizer(template)
    chat = ChatFormat.of(made)
    assert chat is not None
    told = made("Where is the key?", add_special_tokens=False)["input_ids"]
    assert [*chat.prefix, *told, *chat.closing] == rendered(made, "Where is the key?")
    assert chat.prefix[-len(chat.opening) :] == chat.opening
    assert ("Be kind." in made.decode(chat.prefix)) == (template == WITH_SYSTEM)
    whole = rendered(made, "Hello.", "Yes?", "Where is the key?")
    begin, end = chat.last_turn(whole)
    assert whole[begin:end] == told
    assert chat.last_turn(told) is None
    unfinished = whole[: len(whole) - len(chat.closing)]
    assert chat.last_turn(unfinished) == (begin, len(unfinished))


@pytest.mark.parametrize("template", [None, HIDING])
def test_without_a_template_that_shows_contents_there_is_no_format(template: str | None) -> None:
    assert ChatFormat.of(tokenizer(template)) is None


def model(**options: Any) -> Any:
    """A tiny Llama whose vocabulary holds that of the tokenizer."""
    sizes = {"chunk_tokens": 8, "min_chunk_tokens": 1, "retrieved_tokens": 24, **options.pop("config", {})}
    return mplus.wrap(decoder(), {"mechanism": {"name": "kv", **options}, **sizes})


@pytest.fixture(scope="module")
def shared() -> Any:
    return model()


def state_of(memory: Any, row: int = 0) -> KvState:
    return memory.states[row]  # type: ignore[no-any-return]


def test_chunks_are_written_behind_the_prefix_of_the_template_which_is_kept_once(shared: Any) -> None:
    made = tokenizer()
    memory = shared.new_memory(2, tokenizer=made)
    memory.write([text(20, 1), text(11, 2)], "a")
    chat = ChatFormat.of(made)
    assert chat is not None
    decoder = shared.mplus_engine.decoder
    for row, ids in enumerate((text(20, 1), text(11, 2))):
        state = state_of(memory, row)
        assert state.begin_ids.tolist() == list(chat.prefix)
        assert (state.opening_ids.tolist(), state.closing_ids.tolist()) == (list(chat.opening), list(chat.closing))
        assert state.begin_rows.shape == (3, len(chat.prefix), shared.mplus_engine.projection.size)
        begin = torch.tensor(chat.prefix)
        for layer in range(3):
            rows = memory.stores[row].gather(layer, memory.stores[row].ids(layer)).columns()["projected"]
            for chunk, offset in zip(ids.split(8), range(0, len(ids), 8), strict=False):
                with torch.no_grad():
                    whole = decoder.run(torch.cat([begin, chunk])[None], collect={"projected"}).projected[layer][0]
                found = torch.cat([state.begin_rows[layer], rows[offset : offset + len(chunk)]])
                torch.testing.assert_close(found, whole, rtol=0, atol=tiny.rounding())


def test_begin_rows_are_made_by_the_first_write_alone(shared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, decoder = shared.new_memory(tokenizer=tokenizer()), type(shared.mplus_engine.decoder)
    passes, run = [], decoder.run
    monkeypatch.setattr(decoder, "run", lambda self, ids, **how: passes.append(ids.shape[1]) or run(self, ids, **how))
    memory.write(text(8, 1))
    assert passes == [len(state_of(memory).begin_ids), 8]
    memory.write(text(16, 2))
    assert passes[2:] == [8, 8]


@pytest.mark.parametrize(
    ("options", "with_template", "wanted"),
    [
        ({}, False, [0]),
        ({"begin": [5, 6]}, True, [5, 6]),
        ({"begin": [5, 6]}, False, [5, 6]),
        ({"begin": []}, True, []),
    ],
)
def test_options_come_before_the_template_and_bos_behind_it(
    options: dict[str, Any], with_template: bool, wanted: list[int]
) -> None:
    memory = model(**options).new_memory(tokenizer=tokenizer() if with_template else None)
    memory.write(text(8, 1))
    memory.write(text(8, 2))
    assert state_of(memory).begin_ids.tolist() == wanted
    assert bool(len(state_of(memory).opening_ids)) == with_template


def test_the_ends_of_a_turn_can_be_given(shared: Any) -> None:
    memory = model(opening=[7, 8], closing=[9]).new_memory(tokenizer=tokenizer())
    memory.write(text(8, 1))
    assert (state_of(memory).opening_ids.tolist(), state_of(memory).closing_ids.tolist()) == ([7, 8], [9])
    with pytest.raises(ConfigError, match="opening must be a list of token ids, or None, got 'no'"):
        model(opening="no")


def test_a_stream_keeps_what_its_chunks_are_behind(shared: Any) -> None:
    """A tokenizer that comes later says where turns begin, and nothing that was written moves."""
    memory = shared.new_memory()
    memory.write(text(8, 1))
    memory.tokenizer = tokenizer()
    memory.write(text(8, 2))
    assert state_of(memory).begin_ids.tolist() == [0]
    assert len(state_of(memory).opening_ids)


def same(one: KvState, other: KvState) -> None:
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, other.tensors()[name]), name


def test_it_is_saved_journalled_forked_and_selected(shared: Any, tmp_path: Path) -> None:
    made = tokenizer()
    with mplus.Memory.open(tmp_path / "kept", shared, tokenizer=made) as memory:
        memory.write(text(12, 1), "a")
        grown = [memory.directory.journal_bytes]
        for turn in range(3):
            memory.write(text(8, turn), "a")
            grown.append(memory.directory.journal_bytes)
        steps = [after - before for before, after in pairwise(grown)]
        assert max(steps) - min(steps) <= 1024, "a block, which records are filled up to: begin rows are written once"
        before = state_of(memory)
        memory.save(tmp_path / "saved")
        memory.directory.close()  # without a checkpoint: everything comes from the journal
    with mplus.Memory.open(tmp_path / "kept", shared, tokenizer=made, read_only=True) as again:
        same(state_of(again), before)
    loaded = mplus.Memory.load(tmp_path / "saved", shared, tokenizer=made)
    same(state_of(loaded), before)
    same(state_of(loaded.fork()), before)
    same(state_of(loaded.select([0, 0]), 1), before)
    repair(tmp_path / "saved", tmp_path / "repaired")
    same(state_of(mplus.Memory.load(tmp_path / "repaired", shared)), before)
    half = loaded.to(torch.bfloat16)
    assert state_of(half).begin_rows.dtype == torch.bfloat16
    same(state_of(half), state_of(loaded.to(dtype=torch.bfloat16)))


def test_a_table_without_begin_is_read_and_written_behind_bos(tmp_path: Path) -> None:
    """As memories were saved when nothing but the table was kept."""
    shared, prompt = model(), text(9, 7)[None]
    memory = shared.new_memory()
    memory.write(text(16, 1))
    expected, rows = logits(shared, prompt, memory), memory.stores[0].layout
    state = state_of(memory)
    table = {name: state.tensors()[name] for name in TABLE}
    earlier = type(state).from_parts(rows, {}, table, clock=state.clock, sources=state.sources, weights=state.weights)
    memory.streams._states = (earlier,)
    assert torch.equal(logits(shared, prompt, memory), expected)
    memory.tokenizer = tokenizer()
    memory.write(text(8, 2))
    assert state_of(memory).begin_ids.tolist() == [0]
    torch.testing.assert_close(state_of(memory).begin_rows, state.begin_rows, rtol=0, atol=0)


def test_what_was_damaged_is_let_go_of(shared: Any) -> None:
    memory = shared.new_memory(tokenizer=tokenizer())
    memory.write(text(16, 1))
    state, layout = state_of(memory), memory.stores[0].layout
    zeros = {**state.tensors(), "begin_rows": torch.zeros_like(state.begin_rows)}
    tensors, lost = type(state).mended(layout, {}, zeros)
    assert not lost
    assert tensors["begin_rows"].shape[1] == 0
    assert torch.equal(tensors["begin_ids"], state.begin_ids)
    tensors, lost = type(state).mended(layout, {}, {**state.tensors(), "chunk_key": torch.zeros(1, 1)})
    assert tensors.keys() == set(TABLE)
    assert lost[0][0] == "what the chunks were written behind, and what they are found by"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"begin_rows": torch.zeros(3, 2, 32)}, r"begin_rows must be finite, torch.float32 \[3, 22, 32\]"),
        ({"chunk_key": torch.zeros(1, 4)}, r"chunk_key must be floating \[2, v\], got torch.float32 \[1, 4\]"),
        ({"begin_ids": torch.zeros(2)}, r"begin_ids must be torch.int32 \[n\]"),
    ],
)
def test_a_begin_that_makes_no_sense_is_refused(shared: Any, change: dict[str, Any], message: str) -> None:
    memory = shared.new_memory(tokenizer=tokenizer())
    memory.write(text(16, 1))
    state = state_of(memory)
    message = message.replace("22", str(len(state.begin_ids)))
    with pytest.raises(MemoryMismatchError, match=message):
        type(state).from_parts(memory.stores[0].layout, {}, {**state.tensors(), **change}, clock=16)


def test_a_budget_holds_the_begin_too(shared: Any) -> None:
    from tests.memory.tiny import rows_bytes

    memory = shared.new_memory(tokenizer=tokenizer(), bytes_budget=40_000)
    for turn in range(12):
        memory.write(text(8, turn), f"s{turn}")
        assert rows_bytes(memory) <= 40_000
    assert len(state_of(memory).chunk_length) > 3
    small = shared.new_memory(tokenizer=tokenizer(), bytes_budget=12_000)
    with pytest.raises(
        ConfigError, match=r"bytes_budget must have room for the .* tokens that chunks are written behind"
    ):
        small.write(text(8, 1))
    assert not len(state_of(small).chunk_length)


def test_changed_weights_have_the_begin_computed_anew() -> None:
    changed = model()
    memory = changed.new_memory(tokenizer=tokenizer())
    memory.write(text(16, 1), "a")
    memory.forget("a")
    before = state_of(memory).begin_rows
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(1.1)
    memory.write(text(16, 1), "a")
    again = changed.new_memory(tokenizer=tokenizer())
    again.write(text(16, 1), "a")
    assert torch.equal(state_of(memory).begin_rows, state_of(again).begin_rows)
    assert not torch.equal(state_of(memory).begin_rows, before)


def test_a_rebuilt_stream_has_the_begin_it_had(shared: Any) -> None:
    memory = shared.new_memory(tokenizer=tokenizer(), keep_text=True)
    for name in ("a", "b"):
        memory.write(text(16, 1), name)
    before = state_of(memory)
    memory.forget("b", mode="rebuild")
    assert torch.equal(state_of(memory).begin_rows, before.begin_rows)
    assert torch.equal(state_of(memory).opening_ids, before.opening_ids)


def test_streams_of_one_pass_may_begin_differently() -> None:
    made = wrapped()
    together = [made.new_memory(), made.new_memory()]
    together[1].write(torch.tensor([3]))
    together[1].forget(None)
    state = state_of(together[1])
    begin = {"begin_ids": torch.tensor([5, 6], dtype=torch.int32), "begin_rows": state.begin_rows[:, :0]}
    others = {"clock": state.clock, "sources": state.sources, "weights": state.weights}
    other = type(state).from_parts(together[1].stores[0].layout, {}, {**state.tensors(), **begin}, **others)
    together[1].streams._states = (other,)
    mplus.write_together(together, [text(8, 1), text(8, 1)])
    alone = wrapped(begin=[5, 6]).new_memory()
    alone.write(text(8, 1))
    assert [len(state_of(memory).begin_ids) for memory in together] == [1, 2]
    found, wanted = (m.stores[0].gather(1, m.stores[0].ids(1)).columns()["projected"] for m in (together[1], alone))
    torch.testing.assert_close(found, wanted, rtol=0, atol=tiny.rounding())
