"""Whatever fails, and whenever the power goes: what was acknowledged is there, and nothing is half there."""

from __future__ import annotations

import random
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch

from mplus.errors import LiveMemoryError, MemoryFileError
from mplus.memory import Memory
from tests.conftest import NIGHTLY
from tests.memory.disks.disks import Failing, Forgetful, Short, open_memory
from tests.memory.disks.plain import PlainModel, chunk, reopened
from tests.memory.tiny import assert_same, content, difference

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


MODEL = PlainModel()
LONG = torch.cat([chunk(number) for number in (50, 51, 52)])
CHANGES: dict[str, Callable[[Any], object]] = {
    "write": lambda memory: memory.write([chunk(50), chunk(51)], source="new"),
    "forget": lambda memory: memory.forget("b"),
    "reset": lambda memory: memory.reset(),
    "pin": lambda memory: memory.pin("a"),
    "replace": lambda memory: memory.replace("b", [chunk(50), chunk(51)]),
    "all or nothing": lambda memory: memory.write([LONG, chunk(51)], source="new", atomic=True),
    "checkpoint": lambda memory: memory.directory and memory.checkpoint(),  # forks have nothing to do
}


def filled(path: Path, files: Any) -> Memory:
    """Rows in every tier, in files and in the journal."""
    memory = open_memory(path, MODEL, batch_size=2, files=files)
    for number in range(5):
        memory.write([chunk(number), chunk(number + 20)], source="ab"[number % 2])
    memory.checkpoint()
    memory.write([chunk(6), None], source="b")
    return memory


def faults(calls: int) -> list[tuple[int, bool, bool]]:
    """Which call fails, whether all after it do, and whether it has its effect before: all of them, or some."""
    ways = [(False, False), (True, False), (False, True), (True, True)]
    every = [(at, *way) for at in range(1, calls + 1) for way in ways]
    return every if NIGHTLY or calls < 4 else [(at, *ways[at // 2 % 4]) for at in range(1, calls + 1, 2)]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_fails_leaves_memory_and_directory_as_before(tmp_path, change):
    files = Failing()
    memory = filled(tmp_path / "memory", files)
    before = content(memory)
    twin = memory.fork()
    CHANGES[change](twin)
    after = content(twin)
    files.fail(10**9, lasting=False, late=False)
    shutil.copytree(tmp_path / "memory", tmp_path / "spare")
    CHANGES[change](memory)
    assert difference(content(memory), after) == []
    calls, outcomes = files.calls, set()
    assert calls > 1
    memory.close()
    for place, (at, lasting, late) in enumerate(faults(calls)):
        path = shutil.copytree(tmp_path / "spare", tmp_path / str(place))
        files = Failing()
        memory = open_memory(path, MODEL, files=files)
        files.fail(at, lasting=lasting, late=late)
        raised = True
        try:
            CHANGES[change](memory)
            raised = False
        except (MemoryFileError, LiveMemoryError):
            pass
        assert files.failed, "the fault struck"
        held = content(memory)
        files.heal()
        if not raised:  # what failed was tidying up
            assert difference(held, after) == []
        else:
            assert difference(held, before) == [] or difference(held, after) == []
        on_disk = content(reopened(path, MODEL))
        if memory.directory.failed is None:
            assert difference(on_disk, held) == [], "memory and directory agree"
            memory.write([chunk(70), chunk(71)])
            assert_same(reopened(path, MODEL), memory)
            outcomes.add("went on")
        else:
            assert difference(on_disk, before) == [] or difference(on_disk, after) == []
            with pytest.raises(LiveMemoryError, match="state on disk unknown"):
                memory.write([chunk(70), chunk(71)])
            assert difference(content(memory), held) == [], "reading goes on"
            outcomes.add("gave up")
        last = content(memory) if memory.directory.failed is None else on_disk
        memory.close()
        with Memory.open(path, MODEL) as again:
            assert difference(content(again), last) == []
            again.write([chunk(72), chunk(73)])
            assert_same(reopened(path, MODEL), again)
        shutil.rmtree(path)
    assert outcomes == {"went on", "gave up"} if NIGHTLY or change == "write" else "went on" in outcomes


def test_short_writes_are_finished(tmp_path):
    memory = filled(tmp_path / "memory", Short())
    assert_same(reopened(tmp_path / "memory"), memory)


class Losing(Forgetful):
    """At every call, looks at what a loss of power would leave there, in several ways."""

    def __init__(self, folder: Path, scratch: Path, ways: int) -> None:
        super().__init__()
        self.folder, self.scratch, self.ways = folder, scratch, ways
        self.acknowledged: dict[str, Any] | None = None
        self.on_its_way: dict[str, Any] | None = None
        self.crashes = 0
        self.looking = True

    def before(self, call: int, what: str) -> None:
        self.look()

    def look(self) -> None:
        if self.acknowledged is None or not self.looking:
            return
        for way in range(self.ways):
            self.crashes += 1
            into = self.scratch / str(self.crashes)
            self.lose_power(self.folder, into, random.Random(self.crashes) if way else None)
            memory = Memory.open(into, MODEL, batch_size=2)
            found = content(memory)
            memory.directory.close()
            expected = [self.acknowledged] + ([self.on_its_way] if self.on_its_way else [])
            assert any(difference(found, one) == [] for one in expected), difference(found, expected[0])
            shutil.rmtree(into)


def test_loss_of_power_loses_nothing_acknowledged(tmp_path, record_property):
    folder, scratch = tmp_path / "memory", tmp_path / "scratch"
    scratch.mkdir()
    files = Losing(folder, scratch, ways=8 if NIGHTLY else 2)
    new = MODEL.new_memory(batch_size=2)
    files.acknowledged = content(new)
    memory = open_memory(folder, MODEL, batch_size=2, journal_bytes=25_000, files=files)
    twin = memory.fork()
    changes: list[Callable[[Any], object]] = [
        *(lambda m, n=n: m.write([chunk(n), chunk(n + 30)], source="ab"[n % 2]) for n in range(30 if NIGHTLY else 5)),
        lambda m: m.forget("a"),
        lambda m: m.write([chunk(8), None], source="c"),
        lambda m: m.reset(),
        lambda m: m.write([None, chunk(3)]),
    ]
    for change in changes:
        change(twin)
        files.on_its_way = content(twin)
        change(memory)
        files.acknowledged, files.on_its_way = files.on_its_way, None
        files.look()
    memory.close()
    files.look()
    assert memory.directory.manifest.number > 3, "checkpoints were among what was interrupted"
    record_property("crashes", files.crashes)
    assert files.crashes > 100


def test_the_loss_of_power_is_noticed_where_something_is_not_synced(tmp_path, monkeypatch):
    """The test above can fail."""
    folder, scratch = tmp_path / "memory", tmp_path / "scratch"
    scratch.mkdir()
    for missing in ("sync", "sync_folder"):
        files = Losing(folder, scratch, ways=1)
        memory = open_memory(folder, MODEL, batch_size=2, files=files)
        monkeypatch.setattr(files, missing, lambda handle: None)
        memory.write([chunk(1), chunk(2)])
        memory.checkpoint()
        memory.write([chunk(1), chunk(2)])
        files.acknowledged = content(memory)
        with pytest.raises((AssertionError, MemoryFileError)):
            files.look()
        files.looking = False
        memory.close()
        shutil.rmtree(folder)
        shutil.rmtree(scratch)
        scratch.mkdir()
