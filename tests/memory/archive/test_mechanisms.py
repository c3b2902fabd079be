"""Memories of keys and values, and of text, come in as they went out."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import pytest
import torch

from mplus.errors import MemoryMismatchError
from mplus.memory import Memory
from mplus.memory.format.verify import verify
from tests.mechanisms.kv.memories import logits, text, whole, wrapped
from tests.mechanisms.text.decoders import CAT, KEY, with_notes
from tests.mechanisms.text.decoders import tokenizer as words
from tests.memory import tiny

if TYPE_CHECKING:
    from pathlib import Path

KV = wrapped(long_term_tokens=None)


def exported(memory: Memory) -> bytes:
    out = io.BytesIO()
    memory.export(out)
    return out.getvalue()


def imported(path: Path, model: Any, known: Any, memory: Memory) -> Memory:
    other = Memory.open(path, model, tokenizer=known)
    other.import_(io.BytesIO(exported(memory)))
    assert other.sources() == memory.sources()
    assert exported(other) == exported(memory)
    assert verify(path) == []
    return other


def test_of_keys_and_values(tmp_path):
    memory = KV.new_memory()
    for number in range(5):
        memory.write(text(6 + number, number), source=f"s{number % 2}", write_id=f"{number}")
    with imported(tmp_path / "live", KV, None, memory) as other:
        with torch.no_grad():
            assert torch.equal(*(logits(KV, whole(text(4, 9)), one) for one in (memory, other)))
        for one in (memory, other):
            one.forget("s1")
            one.write(text(7, 20), source="new")
        assert exported(other) == exported(memory)


def test_of_text(tmp_path):
    model = with_notes()
    memory = model.new_memory(tokenizer=words())
    memory.write(CAT, source="cat")
    memory.write(KEY, source="key")
    with imported(tmp_path / "live", model, words(), memory) as other:
        assert other.search("Where is the key?") == memory.search("Where is the key?")
        assert other.text("cat") == memory.text("cat")
        other.forget("cat")
        memory.forget("cat")
        assert exported(other) == exported(memory)


def test_those_of_one_mechanism_are_none_of_another():
    for model, other in ((KV, with_notes()), (with_notes(), KV), (KV, tiny.variant("paper"))):
        with pytest.raises(MemoryMismatchError, match="mechanism is"):
            other.new_memory().import_(io.BytesIO(exported(model.new_memory())))
