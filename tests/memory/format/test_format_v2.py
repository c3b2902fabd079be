"""The memory of format version 2 that is kept with the tests is read as it was written."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import pytest
import torch

import mplus
from mplus.memory.format.manifest import read_manifest
from mplus.memory.format.verify import verify
from mplus.memory.sources.source import Source
from tests.fixtures import make_memory_v1, make_memory_v2
from tests.memory import tiny

if TYPE_CHECKING:
    from pathlib import Path

CONTENT = "725efb39096fb8259d3fe4b367def80504920d3f8907ae9ef73e45e353de4e2b"


@pytest.fixture(scope="module")
def memory() -> mplus.Memory:
    return mplus.Memory.load(make_memory_v2.FOLDER, make_memory_v1.build_model())


def test_it_is_of_its_version() -> None:
    assert read_manifest(make_memory_v2.FOLDER).version == 2
    assert verify(make_memory_v2.FOLDER) == []


def test_every_tensor_is_the_one_that_was_written(memory: mplus.Memory) -> None:
    tensors = [tensor for _, tensor in sorted(tiny.content(memory).items()) if isinstance(tensor, torch.Tensor)]
    assert hashlib.sha256(b"".join(map(tiny.raw, tensors))).hexdigest() == CONTENT


def test_every_source_is_there(memory: mplus.Memory) -> None:
    """The number of the forgotten one was not given again."""
    time, expires = 1796083200.5, 1803859200.0
    assert dict(memory.states[0].sources.items()) == {
        0: Source("Märchen", 60, 8, time=time, write_id="schreiben-1 é"),
        2: Source(None, 26, 4),
        3: Source("notes", 8, 1, expires=expires, pinned=True),
    }
    assert dict(memory.states[1].sources.items()) == {
        0: Source("Märchen", 30, 4, time=time, write_id="schreiben-1 é"),
        1: Source(None, 9, 2),
        2: Source("gone, but for its name"),
        3: Source("notes", 8, 1, expires=expires, pinned=True),
    }
    assert memory.forgotten(1) == ["gone, but for its name"]
    assert [[source.name for source in memory.sources(row)] for row in (0, 1)] == [["Märchen", None, "notes"]] * 2


def test_texts_and_what_waits(memory: mplus.Memory) -> None:
    state = memory.states[0]
    assert state.texts is not None
    assert [len(text.ids) for text in state.texts.chunks()] == [8] * 7 + [4] + [8] * 3 + [2] + [8]
    assert [text.source for text in state.texts.chunks()] == [0] * 8 + [2] * 4 + [3]
    assert [(part.ids.tolist(), part.source) for part in state.tail] == [([1, 51, 7], 0)]
    assert memory.states[1].tail == ()


def test_it_goes_on_and_is_saved_again(memory: mplus.Memory, tmp_path: Path) -> None:
    memory = memory.fork()
    memory.write([make_memory_v1.text(12, 10)] * 2, source="notes")
    memory.forget("Märchen", mode="rebuild")
    memory.save(tmp_path)
    tiny.assert_same(mplus.Memory.load(tmp_path, make_memory_v1.build_model()), memory)
    assert memory.forgotten(1) == ["gone, but for its name"]
