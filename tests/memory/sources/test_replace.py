"""One text in the place of another, and texts that are written wholly or not at all."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
import torch

from mplus.errors import InputError, NonFiniteError
from mplus.memory import Memory
from mplus.memory.writing.change import ChunkChange
from tests.helpers.clock import NOON, Hands
from tests.memory.disks.plain import CONFIGS, PlainModel, chunk
from tests.memory.tiny import assert_content, assert_same, content

if TYPE_CHECKING:
    from pathlib import Path

MODEL = PlainModel()
LONG = torch.cat([chunk(number) for number in (20, 21, 22)])


def filled(memory: Memory) -> Memory:
    for number in range(4):
        memory.write([chunk(number), chunk(number + 9)], source="ab"[number % 2])
    return memory


@pytest.mark.parametrize("live", [None, *CONFIGS])
def test_it_is_forget_and_write(tmp_path: Path, live: str | None) -> None:
    model = PlainModel(**CONFIGS.get(live or "", {}))
    memory = Memory.open(tmp_path / "live", model, batch_size=2) if live else model.new_memory(2)
    expected, version = filled(memory).fork(), memory.version
    expected.forget("a", row=1)
    expected.write([None, LONG], source="a")
    report = memory.replace("a", LONG, row=1)
    assert report.chunks == [0, 3]
    assert memory.version == version + 1
    assert_same(memory, expected)
    expected.write([LONG, chunk(1)], source="new")
    assert memory.replace("new", [LONG, chunk(1)]).chunks == [3, 1], "it need not be there before"
    assert_same(memory, expected)
    expected.write([chunk(2), LONG], source="all")
    memory.write([chunk(2), LONG], source="all", atomic=True)
    assert_same(memory, expected)
    if live:
        assert_same(Memory.open(tmp_path / "live", model, read_only=True), memory)


def test_what_was_said_of_a_source_holds_on() -> None:
    clock = Hands()
    memory = MODEL.new_memory(clock=clock)
    memory.write(chunk(0), source="a", expires=timedelta(days=1))
    memory.pin("a")
    clock.move(hours=1)
    memory.replace("a", chunk(1))
    (source,) = memory.sources()
    assert (source.written, source.expires, source.pinned) == (clock.now, NOON + timedelta(days=1), True)
    memory.replace("a", chunk(1), expires=timedelta(days=1))
    assert memory.sources()[0].expires == clock.now + timedelta(days=1)


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("change", ["replace", "write"])
def test_what_does_not_come_to_its_end_leaves_nothing(tmp_path: Path, live: bool, change: str, monkeypatch) -> None:
    memory = filled(Memory.open(tmp_path / "live", MODEL, batch_size=2) if live else MODEL.new_memory(2))
    before, version, apply, calls = content(memory), memory.version, ChunkChange.make, iter(range(9))

    def failing(*arguments: object) -> None:
        if next(calls) == 1:
            assert_content(memory, before)  # nothing shows meanwhile
            raise error
        apply(*arguments)

    def begin() -> object:
        if change == "replace":
            return memory.replace("a", [LONG, LONG])
        return memory.write([LONG, LONG], source="a", atomic=True)

    monkeypatch.setattr(ChunkChange, "make", failing)
    for error in (NonFiniteError("NaN"), KeyboardInterrupt()):
        calls = iter(range(9))
        with pytest.raises(type(error)):
            begin()
        assert_content(memory, before)
        assert memory.version == version
        if live:
            assert_same(Memory.open(tmp_path / "live", MODEL, read_only=True), memory)
    with pytest.raises(InputError):
        memory.replace("a", [LONG, torch.tensor([10**6])])
    assert_content(memory, before)
    assert begin().chunks == [3, 3]


def test_all_at_once_is_one_after_the_other(tmp_path: Path) -> None:
    """A record of the journal, where it is not too long for one."""
    expected = MODEL.new_memory(2)
    filled(expected).write([LONG, chunk(0)], source="a")
    for journal_bytes in (2**20, 100):
        with Memory.open(tmp_path / str(journal_bytes), MODEL, batch_size=2, journal_bytes=2**20) as memory:
            filled(memory)
            memory.streams.persistence.journal_bytes = journal_bytes
            records = memory.directory.journal.records
            memory.write([LONG, chunk(0)], source="a", atomic=True)
            assert memory.directory.journal.records == (records + 1 if journal_bytes > 100 else 0)
            assert_same(memory, expected)
            assert_same(Memory.open(tmp_path / str(journal_bytes), MODEL, read_only=True), memory)


def test_an_index_goes_on_with_what_it_has() -> None:
    memory = filled(MODEL.new_memory(2))
    before = [store.identity for store in memory.stores]
    memory.write([LONG, LONG], atomic=True)
    assert [store.identity for store in memory.stores] == before
