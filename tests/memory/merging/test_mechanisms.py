"""Memories of keys and values, and of text, are after a merge what they are when they are written both texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import mplus
from mplus.errors import MemoryMismatchError
from mplus.hf.pretrained.shipped import load_decoder, load_tokenizer
from mplus.memory.format.verify import verify
from tests.helpers.clock import Hands
from tests.mechanisms.kv.memories import decoder, logits, text, tokenizer, wrapped
from tests.mechanisms.text.decoders import CAT, KEY, with_notes
from tests.mechanisms.text.decoders import tokenizer as words

if TYPE_CHECKING:
    from pathlib import Path

MODEL = wrapped(long_term_tokens=None)


def content(memory: Any) -> dict[str, Any]:
    """Everything a stream holds, with names in the place of numbers of sources."""
    state, store = memory.states[0], memory.stores[0]
    names = {number: source.name for number, source in state.sources.items()}
    found: dict[str, Any] = {}
    for layer in range(store.layout.layers):
        for name, column in store.gather(layer, store.ids(layer)).columns().items():
            found[f"{layer}.{name}"] = [names[n] for n in column.tolist()] if name == "source" else column.tolist()
    for name, tensor in state.tensors().items():
        found[name] = [names[n] for n in tensor.tolist()] if name == "chunk_source" else tensor.tolist()
    facts = {source.name: source for source in state.sources}
    return {**found, "clock": state.clock, "sources": facts}


def two(model: Any, turns: str, **options: Any) -> tuple[Any, Any, Any]:
    """Two memories that were written by turns ("o" and "x"), and one that was written all of it."""
    clock = Hands()
    own, other, both = (model.new_memory(clock=clock, **options) for _ in range(3))
    for number, turn in enumerate(turns):
        for memory in (own if turn == "o" else other, both):
            memory.write(text(6 + number, number), source=f"s{number % 4}")
        clock.move(hours=1)
    return own, other, both


class TestKv:
    @pytest.mark.parametrize("turns", ["ooxx", "xxoo", "oxox", "xoox", "oo", "xx", "ooo" + "x" * 9])
    def test_it_is_what_writing_both_gives(self, turns: str) -> None:
        own, other, both = two(MODEL, turns)
        own.merge(other)
        assert content(own) == content(both)
        for seed in range(3):
            assert torch.equal(logits(MODEL, text(6, seed)[None], own), logits(MODEL, text(6, seed)[None], both))
        for memory in (own, both):
            memory.write(text(9, 77), source="later")
        assert content(own) == content(both)

    def test_in_a_directory(self, tmp_path: Path) -> None:
        clock = Hands()
        own = mplus.Memory.open(tmp_path / "own", MODEL, clock=clock)
        other, both = (MODEL.new_memory(clock=clock) for _ in range(2))
        for number, memory in enumerate((own, other, own, other)):
            for target in (memory, both):
                target.write(text(11, number), source=f"s{number}")
            clock.move(hours=1)
        own.merge(other)
        assert content(mplus.Memory.open(tmp_path / "own", MODEL, read_only=True)) == content(both)
        own.close()
        assert verify(tmp_path / "own") == []
        assert content(mplus.Memory.open(tmp_path / "own", MODEL, read_only=True)) == content(both)

    def test_at_capacity_whole_chunks_leave(self) -> None:
        model = wrapped()
        own, other, both = two(model, "oooxxx")
        report = own.merge(other)
        kept = own.states[0]
        assert kept.tokens <= 40
        assert report.evicted_rows == [sum(range(6, 12)) - kept.tokens]
        assert content(own)["token_ids"] == content(both)["token_ids"]
        assert torch.equal(logits(model, text(6, 2)[None], own), logits(model, text(6, 2)[None], both))

    def test_an_empty_memory_takes_all_over(self) -> None:
        model = mplus.wrap(decoder(), {"mechanism": "kv", "chunk_tokens": 24, "retrieved_tokens": 48})
        full, empty = (model.new_memory(tokenizer=tokenizer(), clock=Hands()) for _ in range(2))
        full.write("The key is under the blue stone.", source="a")
        empty.merge(full)
        assert content(empty) == content(full)
        full.merge(model.new_memory(tokenizer=tokenizer()))
        assert content(empty) == content(full)

    def test_chunks_that_do_not_fit_together(self) -> None:
        model = mplus.wrap(decoder(), {"mechanism": "kv", "chunk_tokens": 24, "retrieved_tokens": 48})
        known, none = model.new_memory(tokenizer=tokenizer()), model.new_memory()
        known.write("The key is under the blue stone.", source="a")
        none.write(text(20, 1) % 200, source="b")
        before = content(known)
        with pytest.raises(MemoryMismatchError, match="must have been written behind the same tokens"):
            known.merge(none)
        assert content(known) == before

    def test_a_trained_decoder_finds_what_either_was_told(self) -> None:
        known = load_tokenizer()
        model = mplus.wrap(load_decoder(), {"mechanism": "kv", "chunk_tokens": 32})
        own, other, both = (model.new_memory(tokenizer=known, clock=Hands()) for _ in range(3))
        for memory, told, name in ((own, KEY, "key"), (other, CAT, "cat")):
            for target in (memory, both):
                target.write(told * 3, source=name)
        own.merge(other)
        for asked in ("Where is the key?", "What has Lily?"):
            assert own.search(asked) == both.search(asked)
        assert {own.search(asked)[0].source for asked in ("Where is the key?", "What has Lily?")} == {"key", "cat"}


def test_notes(tmp_path: Path) -> None:
    model, clock = with_notes(), Hands()
    own, other, both = (model.new_memory(tokenizer=words(), clock=clock) for _ in range(3))
    for number, (memory, told) in enumerate(((own, KEY), (other, CAT), (own, "Tom has a dog."), (other, "It rained."))):
        for target in (memory, both):
            target.write(told, source=f"s{number}")
        clock.move(hours=1)
    own.merge(other)
    assert own.states[0].entries() == both.states[0].entries()
    assert own.states[0].clock == both.states[0].clock
    own.save(tmp_path / "saved")
    assert verify(tmp_path / "saved") == []
    assert own.forget("s1").chunks == 1
    assert [entry.source for entry in own.states[0].entries()] == ["s0", "s2", "s3"]
