"""A memory as a Python object: copies are forks, and it is never pickled."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch

import mplus
from mplus.errors import LiveMemoryError, MemoryMismatchError, MemoryPickleError
from tests.memory import tiny

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mplus.memory import Memory

LENGTHS = [150, 40]
COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "in a dict": lambda memory: copy.deepcopy({"memory": memory})["memory"],
    "in an object": lambda memory: copy.deepcopy(Conversation(memory)).memory,
}


class Conversation:
    """Somebody's object that holds a memory."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory


@pytest.mark.parametrize("way", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("name", ["paper", "published", "memoryllm"])
def test_a_copy_is_a_fork(name: str, way: Callable[[Any], Any]) -> None:
    memory = tiny.written(name, LENGTHS)
    before, twin = tiny.content(memory), way(memory)
    assert type(twin) is mplus.Memory
    assert twin is not memory
    assert twin.engine is memory.engine
    tiny.assert_same(twin, memory)
    fork = memory.fork()
    for other in (twin, fork):
        other.write([tiny.ids(90, 3), tiny.ids(30, 4)], source="later")
    tiny.assert_same(twin, fork)
    tiny.assert_content(memory, before)


def test_a_deep_copy_holds_one_twin_of_a_memory_that_comes_twice() -> None:
    memory = tiny.written("paper", LENGTHS)
    one, other = copy.deepcopy([memory, memory])
    assert one is other
    shallow = copy.copy([memory])
    assert shallow[0] is memory


def test_a_copy_of_a_memory_in_a_directory_is_an_ordinary_one(tmp_path: Path) -> None:
    model = tiny.variant("paper")
    with mplus.Memory.open(tmp_path, model) as memory:
        memory.write(tiny.ids(150))
        for twin in (copy.copy(memory), copy.deepcopy(memory)):
            assert type(twin) is mplus.Memory
            tiny.assert_same(twin, memory)
            before = tiny.content(memory)
            twin.write(tiny.ids(40, 1))
            tiny.assert_content(memory, before)
        with pytest.raises(LiveMemoryError):
            mplus.Memory.open(tmp_path, model)
        memory.write(tiny.ids(40, 2))
        expected = tiny.content(memory)
    with mplus.Memory.open(tmp_path, model) as again:
        tiny.assert_content(again, expected)


def test_a_memory_that_is_copied_with_its_decoder_belongs_to_the_copy() -> None:
    model, text = tiny.build(), tiny.prompts(1)
    memory = model.new_memory()
    memory.write(tiny.ids(150))
    twin_model, twin = copy.deepcopy((model, memory))
    assert twin.engine is twin_model.mplus_engine
    with torch.no_grad():
        expected = model(text, memory=memory).logits
        assert torch.equal(twin_model(text, memory=twin).logits, expected)
        twin.write(tiny.ids(60, 1))
        with pytest.raises(MemoryMismatchError, match="another model"):
            twin_model(text, memory=memory)
        assert torch.equal(model(text, memory=memory).logits, expected)


def to_bytes(memory: Any) -> None:
    pickle.dumps(memory)


def to_file(memory: Any) -> None:
    torch.save({"step": 3, "memory": memory}, io.BytesIO())


def to_process(memory: Any) -> None:
    multiprocessing.get_context("spawn").Process(target=print, args=(memory,)).start()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_no_protocol_pickles_a_memory(protocol: int) -> None:
    with pytest.raises(MemoryPickleError):
        pickle.dumps(tiny.written("paper", [20]), protocol)


@pytest.mark.parametrize("way", [to_bytes, to_file, to_process])
@pytest.mark.parametrize("held", [False, True], ids=["memory", "in an object"])
def test_a_memory_is_not_pickled(way: Callable[[Any], None], held: bool) -> None:
    memory = tiny.written("paper", LENGTHS)
    before = tiny.content(memory)
    message = r"cannot be pickled .*memory\.save\(path\).*mplus\.Memory\.load\(path, model\).*Memory\.open"
    with pytest.raises(MemoryPickleError, match=message) as raised:
        way(Conversation(memory) if held else memory)
    assert isinstance(raised.value, pickle.PicklingError | TypeError)
    tiny.assert_content(memory, before)


def test_neither_is_one_in_a_directory(tmp_path: Path) -> None:
    with mplus.Memory.open(tmp_path, tiny.variant("paper")) as memory, pytest.raises(MemoryPickleError):
        pickle.dumps(memory)
