"""A new directory made of an exported memory: all of it is there, or nothing, whatever ends the making."""

from __future__ import annotations

import io
import os
import random
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest

from mplus.errors import MemoryFileError, MemoryFullError, MemoryMismatchError
from mplus.memory import Memory
from mplus.memory.directory.removal import delete_memory, remove_deleted
from tests.conftest import NIGHTLY
from tests.memory.disks.disks import Deadly, open_memory
from tests.memory.disks.plain import PlainModel, chunk, reopened
from tests.memory.tiny import content, difference

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MODEL = PlainModel()


@pytest.fixture(scope="module")
def memory() -> Memory:
    memory = MODEL.new_memory(batch_size=2)
    for number in range(9):
        memory.write([chunk(number), chunk(number + 20)], source=f"{number % 3}")
    return memory


@pytest.fixture(scope="module")
def stream(memory: Memory) -> bytes:
    out = io.BytesIO()
    memory.export(out)
    return out.getvalue()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_all_of_it_is_there(tmp_path, memory, stream):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "a" / "b", tmp_path / "empty"):
        with Memory.from_export(path, io.BytesIO(stream), MODEL, max_bytes=len(stream)) as made:
            assert difference(content(made), content(memory)) == []
            assert made.batch_size == 2
            assert made.directory.path == path
            made.write([chunk(50), None])
            assert difference(content(reopened(path)), content(made)) == []
    assert names(tmp_path) == ["a", "empty"]
    assert names(tmp_path / "a") == ["b"]


def test_what_is_refused_leaves_nothing(tmp_path, stream):
    other = PlainModel(mechanism={"name": "mplus", "merge_every": 3})
    for data, model, error, options in (
        (stream[:-1], MODEL, MemoryFileError, {}),
        (b"garbage", MODEL, MemoryFileError, {}),
        (stream, other, MemoryMismatchError, {}),
        (stream, MODEL, MemoryFullError, {"max_bytes": 1000}),
    ):
        with pytest.raises(error):
            Memory.from_export(tmp_path / "new", io.BytesIO(data), model, **options)
        assert names(tmp_path) == []
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("taken")
    for name in ("taken", "file", "link", "nul\0"):
        with pytest.raises(MemoryFileError):
            Memory.from_export(tmp_path / name, io.BytesIO(stream), MODEL)
    assert names(tmp_path) == ["file", "link", "taken"]


def test_one_that_is_being_made_is_not_taken_for_what_a_crash_left(tmp_path):
    busy, left = tmp_path / ".mplus-new-0123456789abcdef", tmp_path / ".mplus-new-fedcba9876543210"
    begun = tmp_path / ".mplus-new-00000000000000aa"
    Memory.open(left, MODEL).close()
    begun.mkdir()
    with Memory.open(busy, MODEL):
        assert remove_deleted(tmp_path) == []
        assert names(tmp_path) == sorted([busy.name, begun.name])
    os.utime(begun, (0, time.time() - 7200))
    assert remove_deleted(tmp_path) == []
    assert names(tmp_path) == []


# ---------------------------------------------------------------------- killed


def child(work: Callable[[], object], kill_after: float | None = None) -> bool:
    """Let a child do something, and return whether it was killed: by itself, or by us so many seconds later."""
    process = os.fork()
    if process == 0:
        try:
            work()
        finally:
            os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    return os.WIFSIGNALED(status)


def test_killed_in_an_import_it_is_empty_or_whole(tmp_path, memory, stream):
    def work(path: Path, at: int) -> None:
        files = Deadly(10**9)
        made = open_memory(path, MODEL, batch_size=2, files=files)
        files.calls, files.at = 0, at
        made.import_(io.BytesIO(stream))

    outcomes = set()
    for at in range(1, 25, 1 if NIGHTLY else 4):
        path = tmp_path / str(at)
        if not child(lambda path=path, at=at: work(path, at)):
            break
        with Memory.open(path, MODEL, batch_size=2) as found:
            outcomes.add(found.is_empty)
            if found.is_empty:
                found.import_(io.BytesIO(stream))
            assert difference(content(found), content(memory)) == []
            assert set(names(path)) == {*found.directory.manifest.files, "manifest.json", "lock"}
    assert True in outcomes


def test_killed_at_any_time_a_new_directory_is_whole_or_not_there(tmp_path, memory, stream):
    draw, whole = random.Random(0), 0
    for turn in range(100 if NIGHTLY else 6):
        path = tmp_path / str(turn) / "anna"
        path.parent.mkdir()

        def work(path: Path = path) -> Any:
            return Memory.from_export(path, io.BytesIO(stream), MODEL).close()

        child(work, draw.random() * 0.2)
        if path.exists():
            whole += 1
            assert difference(content(reopened(path)), content(memory)) == []
        remove_deleted(path.parent)
        # A folder without a lock is left for an hour: somebody may be about to lock it.
        left = [name for name in names(path.parent) if name != "anna"]
        assert all(not names(path.parent / name) for name in left)
    assert whole < turn + 1 or not NIGHTLY


def test_killed_in_a_deletion_it_is_whole_or_gone(tmp_path):
    held = None
    outcomes = set()
    for at in range(1, 12):
        path = tmp_path / str(at) / "anna"
        with Memory.open(path, MODEL) as memory:
            memory.write(chunk(1), source="a")
            memory.checkpoint()
            held = content(memory)
        if not child(lambda path=path, at=at: delete_memory(path, files=Deadly(at))):
            break
        outcomes.add(path.exists())
        if path.exists():
            found = content(reopened(path))
            assert all(found[name] is not None for name in held)
            assert found["0.clock"] == held["0.clock"]
        remove_deleted(path.parent)
        assert names(path.parent) == (["anna"] if path.exists() else [])
    assert outcomes == {True, False}
