"""Writes to many directories at once: journals are synced together, and each memory keeps every promise it makes."""

from __future__ import annotations

import errno
import os
import random
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

import mplus
from mplus.errors import LiveMemoryError, MemoryFileError
from mplus.memory import Memory
from mplus.memory.writing import commit
from mplus.stores.disk.files import FileSystem
from tests.conftest import NIGHTLY
from tests.helpers.clock import noon
from tests.memory.disks.disks import Deadly, Failing, Forgetful, Watched, open_memory
from tests.memory.disks.plain import PlainModel, chunk, reopened
from tests.memory.interruption import interrupted_everywhere
from tests.memory.tiny import assert_same, content, difference

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

MODEL = PlainModel()


def made(path: Path, count: int, files: Sequence[FileSystem | None] = (), **options: Any) -> list[Memory]:
    """Memories in directories, with a chunk in the journal."""
    given = [*files, *[None] * (count - len(files))]
    memories = [open_memory(path / str(user), MODEL, files=given[user], **options) for user in range(count)]
    for user, memory in enumerate(memories):
        memory.write(chunk(user), source="before")
    return memories


def write(memories: Sequence[Memory], number: int = 30, **options: Any) -> Any:
    data = [chunk(number + user) for user in range(len(memories))]
    return mplus.write_together(memories, data, ["new"] * len(memories), progress=False, **options)


def expected(count: int, number: int = 30) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """What each of ``made`` holds before and after ``write``."""
    found = []
    for user in range(count):
        memory = MODEL.new_memory(clock=noon)
        memory.write(chunk(user), source="before")
        before = content(memory)
        memory.write(chunk(number + user), source="new")
        found.append((before, content(memory)))
    return found


class Together(FileSystem):
    """Syncs once so many syncs are waiting at the same time."""

    def __init__(self, barrier: threading.Barrier) -> None:
        self.barrier: threading.Barrier | None = barrier
        self.threads: list[int] = []

    def sync(self, handle: int) -> None:
        if self.barrier is not None:
            self.threads.append(threading.get_ident())
            self.barrier.wait(60)
        super().sync(handle)


@pytest.mark.parametrize("atomic", [False, True])
def test_journals_are_synced_at_the_same_time_and_nothing_shows_before(tmp_path, atomic):
    states = expected(8)
    seen: list[int] = []
    memories: list[Memory] = []
    barrier = threading.Barrier(8, lambda: seen.extend(memory.version for memory in memories))
    files = [Together(barrier) for _ in range(8)]
    for one in files:
        one.barrier = None
    memories += made(tmp_path, 8, files)
    versions = [memory.version for memory in memories]
    for one in files:
        one.barrier = barrier
    write(memories, atomic=atomic)
    assert seen == versions, "with all records on their way to disk, no memory shows its own"
    assert [len(one.threads) for one in files] == [1] * 8
    assert [memory.version for memory in memories] == [version + 1 for version in versions]
    for one in files:
        one.barrier = None
    for user, memory in enumerate(memories):
        assert difference(content(memory), states[user][1]) == []
        assert_same(reopened(tmp_path / str(user)), memory)
        memory.close()


def test_a_sync_that_fails_fails_its_memory_alone(tmp_path):
    states = expected(4)
    for taken_back in (True, False):
        files = [Failing() for _ in range(4)]
        memories = made(tmp_path / str(taken_back), 4, files)
        files[2].fail(2, lasting=not taken_back, late=False)  # the record is written, and not synced
        results = write(memories, errors="return")
        files[2].heal()
        assert [type(result) for result in results].count(mplus.memory.WriteReport) == 3
        assert isinstance(results[2], MemoryFileError)
        assert results[2].__cause__.errno == errno.EIO
        for user, memory in enumerate(memories):
            assert difference(content(memory), states[user][user != 2]) == []
            if user != 2 or taken_back:
                assert_same(reopened(tmp_path / str(taken_back) / str(user)), memory)
        if taken_back:
            write(memories[2:3], 32)
            assert difference(content(memories[2]), states[2][1]) == []
        else:
            with pytest.raises(LiveMemoryError, match="state on disk unknown"):
                memories[2].write(chunk(1))


def test_what_was_written_together_survives_a_loss_of_power(tmp_path):
    files = [Forgetful() for _ in range(3)]
    memories = made(tmp_path / "live", 3, files)
    write(memories)
    for user, memory in enumerate(memories):
        for way in range(4):
            into = tmp_path / f"{user}-{way}"
            files[user].lose_power(tmp_path / "live" / str(user), into, random.Random(way) if way else None)
            assert_same(reopened(into), memory)


def test_many_memories_of_all_kinds(tmp_path, monkeypatch):
    """More than fit into one group, some without a directory, one read-only, one whose two streams need two passes."""
    monkeypatch.setattr(commit, "MOST_TOGETHER", 5)
    memories = made(tmp_path, 12)
    for user in (3, 7, 11):
        memories[user] = memories[user].fork()
    memories[5].close()
    memories[5] = reopened(tmp_path / "5", MODEL)
    two = open_memory(tmp_path / "two", MODEL, batch_size=2)
    two.write([chunk(1), None], source="before")
    results = mplus.write_together(
        [*memories, two],
        [*(chunk(30 + user) for user in range(12)), [chunk(2), chunk(3)[:5]]],
        ["new"] * 13,
        errors="return",
        progress=False,
    )
    states = expected(12)
    assert isinstance(results.pop(5), LiveMemoryError)
    assert all(isinstance(result, mplus.memory.WriteReport) for result in results)
    for user, memory in enumerate(memories):
        assert difference(content(memory), states[user][user != 5]) == []
        if user not in (3, 7, 11):
            assert_same(reopened(tmp_path / str(user)), memory)
    alone = MODEL.new_memory(2, clock=noon)
    alone.write([chunk(1), None], source="before")
    alone.write([chunk(2), chunk(3)[:5]], source="new")
    assert_same(two, alone)
    assert_same(reopened(tmp_path / "two"), two)


def test_without_threads_or_calls_left_all_is_written_all_the_same(tmp_path, monkeypatch):
    states = expected(20)
    memories = made(tmp_path, 20)
    with monkeypatch.context() as patch:
        patch.setattr(ThreadPoolExecutor, "submit", no_threads)
        write(memories)
    for user, memory in enumerate(memories):
        assert difference(content(memory), states[user][1]) == []
    frame, depth = sys._getframe(), 0
    while frame is not None:
        frame, depth = frame.f_back, depth + 1
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(depth + 120)  # enough for one memory, and not for 20 inside of one another
    try:
        write(memories, 60)
    finally:
        sys.setrecursionlimit(before)
    for user, memory in enumerate(memories):
        assert memory.version == 3
        assert memory.sources()[-1].tokens == 16
        assert_same(reopened(tmp_path / str(user)), memory)


def no_threads(*_: object) -> None:
    raise RuntimeError("can't start new thread")


def test_a_record_of_which_nobody_knows_that_it_was_synced_is_taken_back(tmp_path, monkeypatch):
    states = expected(3)
    memories = made(tmp_path, 3)
    with monkeypatch.context() as patch:
        patch.setattr(commit._Group, "_sync", lambda group: None)
        results = write(memories, errors="return")
    assert all(isinstance(result, MemoryFileError) for result in results)
    for user, memory in enumerate(memories):
        assert difference(content(memory), states[user][0]) == []
        assert_same(reopened(tmp_path / str(user)), memory)


@pytest.mark.parametrize("where", ["mplus/memory/writing/commit", "mplus/memory/transaction", "mplus/memory/directory"])
def test_an_interrupt_before_any_line_leaves_each_with_its_chunk_or_without(tmp_path, where):
    state: dict[str, Any] = {"turn": 0}
    outcomes = set()

    def prepare() -> None:
        for memory in state.get("memories", ()):
            memory.directory.close()
        state["turn"] += 1
        state["memories"] = made(tmp_path / str(state["turn"]), 3, [Watched() for _ in range(3)])

    states = expected(3)
    for place in interrupted_everywhere(
        prepare, lambda: write(state["memories"], errors="return"), where, most=90 if NIGHTLY else 12
    ):
        for user, memory in enumerate(state["memories"]):
            folder = tmp_path / str(state["turn"]) / str(user)
            held = content(memory)
            assert memory.directory.failed is None, place
            with_chunk = difference(held, states[user][1]) == []
            assert with_chunk or difference(held, states[user][0]) == [], place
            assert difference(content(reopened(folder)), held) == [], place
            outcomes.add(with_chunk)
        write(state["memories"], 60)
    assert outcomes == {True, False}


def test_an_interrupt_in_a_thread_that_syncs(tmp_path):
    class Interrupted(Watched):
        armed = False

        def before(self, call: int, what: str) -> None:
            if self.armed and what == "sync":
                self.armed = False
                raise KeyboardInterrupt

    states = expected(4)
    files = [Interrupted() for _ in range(4)]
    memories = made(tmp_path, 4, files)
    files[1].armed = True
    with pytest.raises(KeyboardInterrupt):
        write(memories)
    for user, memory in enumerate(memories):
        held = content(memory)
        assert difference(held, states[user][0]) == [] or (user > 1 and difference(held, states[user][1]) == [])
        assert_same(reopened(tmp_path / str(user)), memory)
    write(memories, 60)


def test_killed_at_any_call_each_has_its_chunk_or_not(tmp_path):
    """The process is killed at call after call of one of three file systems."""
    states, kills, outcomes = expected(3), 0, set()
    for user in range(3):
        for at in range(1, 7) if NIGHTLY else (1, 2):
            path = tmp_path / f"{user}-{at}"
            for memory in made(path, 3):
                memory.directory.close()
            if not killed(path, user, at):
                continue
            kills += 1
            for other in range(3):
                with Memory.open(path / str(other), MODEL) as memory:
                    held = content(memory)
                    with_chunk = difference(held, states[other][1]) == []
                    assert with_chunk or difference(held, states[other][0]) == []
                    outcomes.add(with_chunk)
    assert kills == (18 if NIGHTLY else 6)
    assert False in outcomes


def killed(path: Path, user: int, at: int) -> bool:
    """Whether a child is killed that writes to three memories, at a call for one of them after it was opened."""
    child = os.fork()
    if child == 0:
        try:
            files = Deadly(10**9)
            given = [files if other == user else None for other in range(3)]
            memories = [open_memory(path / str(other), MODEL, files=given[other]) for other in range(3)]
            files.calls, files.at = 0, at
            write(memories)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def test_killed_at_random_again_and_again_nothing_acknowledged_is_lost(tmp_path):
    """Four memories are written together, turn after turn, by processes that are killed; with real syncs."""
    draw, ordinary = random.Random(0), [MODEL.new_memory(clock=noon) for _ in range(4)]
    stages = [[content(memory) for memory in ordinary]]
    chunks = [0] * 4
    for _ in range(50 if NIGHTLY else 4):
        acknowledged = max(min(chunks), written_until_killed(tmp_path, draw))
        for user in range(4):
            path = tmp_path / str(user)
            if not (path / "manifest.json").exists():
                assert not acknowledged
                continue
            found = content(reopened(path))
            chunks[user] = found["0.clock"] // 4
            assert acknowledged <= chunks[user] <= acknowledged + 1
            while len(stages) <= chunks[user]:
                for other, memory in enumerate(ordinary):
                    memory.write(chunk(len(stages) + other), source="new")
                stages.append([content(memory) for memory in ordinary])
            assert difference(found, stages[chunks[user]][user]) == []
    assert min(chunks) > 4


def written_until_killed(path: Path, draw: random.Random) -> int:
    """Let a child bring four memories to the same turn, and write on together; return the turns it acknowledged."""
    begun, ready = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(begun)
            memories = [open_memory(path / str(user), MODEL, journal_bytes=30_000) for user in range(4)]
            turn = 1
            while True:
                due = [user for user, memory in enumerate(memories) if memory.states[0].clock // 4 < turn]
                data, names = [chunk(turn + user) for user in due], ["new"] * len(due)
                if due:
                    mplus.write_together([memories[user] for user in due], data, names, progress=False)
                    os.write(ready, bytes([turn]))
                turn += 1
        finally:
            os._exit(1)
    os.close(ready)
    found = bytearray()
    for _ in range(draw.randint(1, 5)):
        found += os.read(begun, 1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while said := os.read(begun, 4096):
        found += said
    os.close(begun)
    return max(found, default=0)
