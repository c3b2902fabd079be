"""A process goes on after a write that failed: what it acknowledges afterwards is there when it is killed."""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import time
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

from mplus.errors import LiveMemoryError, MemoryFileError
from mplus.memory import Memory
from mplus.memory.directory.directory import Directory
from mplus.memory.directory.journal import Journal, records, recover_records
from mplus.memory.format.repair import repair
from mplus.memory.format.verify import verify
from mplus.stores.disk.files import FileSystem, Folder
from tests.conftest import NIGHTLY
from tests.memory.disks.disks import Failing, open_memory
from tests.memory.disks.plain import PlainModel, chunk, reopened
from tests.memory.interruption import interrupted_everywhere
from tests.memory.tiny import assert_same, content, difference

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


MODEL = PlainModel()


def killed(memory: Memory) -> None:
    """What is left when a process is killed: nothing is written any more."""
    Directory.close(memory.directory)


def check_what_follows(memory: Memory, twin: Memory, path: Path) -> None:
    """Five more writes, the end of the process, and a look at what is there."""
    for number in range(5):
        for one in (memory, twin):
            one.write(chunk(60 + number), source=f"{number}")
    assert_same(memory, twin)
    killed(memory)
    assert verify(path) == []
    with Memory.open(path, MODEL) as again:
        assert_same(again, twin)


def written(path: Path, **options: Any) -> tuple[Memory, Memory]:
    """A directory with rows in every tier and records in the journal, and an ordinary memory of the same content."""
    memory = open_memory(path, MODEL, **options)
    for number in range(8):
        memory.write(chunk(number), source="ab"[number % 2])
        if number == 5:
            memory.checkpoint()
    return memory, memory.fork()


@pytest.mark.parametrize("room", [1, 100, 511, 512, 700, 2000])
def test_a_full_disk(tmp_path: Path, room: int) -> None:
    """The kernel writes as much of a record as there is room for, be it a part of a sector."""
    memory, twin = written(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (memory.directory.journal.size + room, before[1]))
    try:
        with pytest.raises(MemoryFileError, match="File too large"):
            memory.write(chunk(9), source="no room")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert_same(memory, twin)
    assert memory.directory.journal.path.stat().st_size == memory.directory.journal.size
    check_what_follows(memory, twin, tmp_path)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("change", ["write", "checkpoint", "forget"])
def test_a_fault_at_every_call(tmp_path: Path, change: str, late: bool) -> None:
    work = {
        "write": lambda memory: memory.write(chunk(50), source="new"),
        "checkpoint": lambda memory: getattr(memory, "checkpoint", int)(),
        "forget": lambda memory: memory.forget("b"),
    }[change]
    went_on = 0
    for at in range(1, 40, 1 if NIGHTLY or change == "write" else 3):
        files = Failing()
        memory, twin = written(tmp_path / str(at), files=files)
        files.fail(at, lasting=False, late=late)
        try:
            work(memory)
            work(twin)
        except (MemoryFileError, LiveMemoryError):
            pass
        files.heal()
        if not files.failed:
            break
        if memory.directory.failed is not None:
            continue
        if difference(content(memory), content(twin)):  # the change is there, though its caller was told of a fault
            work(twin)
        check_what_follows(memory, twin, tmp_path / str(at))
        went_on += 1
    assert went_on >= 2


def test_a_record_that_cannot_be_taken_back_ends_writing_and_nothing_else(tmp_path: Path) -> None:
    class Stuck(FileSystem):
        stuck = False

        def sync(self, handle: int) -> None:
            if self.stuck:
                raise OSError(5, "Input/output error")

        def truncate(self, handle: int, size: int) -> None:
            self.sync(handle)
            super().truncate(handle, size)

    files = Stuck()
    memory, twin = written(tmp_path, files=files)
    files.stuck = True
    with pytest.raises(MemoryFileError, match="Input/output error"):
        memory.write(chunk(9))
    files.stuck = False
    for change in (lambda: memory.write(chunk(9)), lambda: memory.forget("a"), memory.checkpoint):
        with pytest.raises(LiveMemoryError, match="taking it back failed: Input/output error"):
            change()
    assert_same(memory, twin)
    memory.close()
    again = reopened(tmp_path, MODEL)
    twin_after = twin.fork()
    twin_after.write(chunk(9))
    assert difference(content(again), content(twin_after)) == [], "whole, though nobody was told that it is there"


def test_slow_syncs_and_interrupts_at_any_line(tmp_path: Path) -> None:
    """A sync takes its time, as that of a real disk does; an interrupt strikes before, within or after it."""

    class Slow(FileSystem):
        def sync(self, handle: int) -> None:
            time.sleep(0.0005)
            super().sync(handle)

    state: dict[str, Any] = {}
    count = iter(range(10**6))

    def prepare() -> None:
        state["path"] = tmp_path / str(next(count))
        state["memory"], state["twin"] = written(state["path"], files=Slow())

    def write() -> None:
        state["memory"].write(chunk(50), source="new")

    struck = 0
    for _ in interrupted_everywhere(prepare, write, "mplus/memory/", most=120 if NIGHTLY else 14):
        memory, twin = state["memory"], state["twin"]
        if memory.directory.failed is not None:
            continue
        if difference(content(memory), content(twin)):
            twin.write(chunk(50), source="new")
        check_what_follows(memory, twin, state["path"])
        struck += 1
    assert struck > 6


@pytest.mark.parametrize("second", ["truncate", "restore"])
def test_an_interrupt_of_the_taking_back_is_made_good(tmp_path: Path, monkeypatch: Any, second: str) -> None:
    """Ctrl-C twice: the second one strikes while the memory goes back to what it was."""
    memory, twin = written(tmp_path)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FileSystem, "sync", interrupt)
        patch.setattr(FileSystem if second == "truncate" else type(memory.stores[0]), second, interrupt)
        with pytest.raises(KeyboardInterrupt):
            memory.write(chunk(50), source="interrupted")
    assert_same(memory.fork(), twin)
    check_what_follows(memory, twin, tmp_path)
    ordinary = MODEL.new_memory(store="mmap")
    ordinary.write(chunk(1))
    expected = ordinary.fork()
    with monkeypatch.context() as patch:
        patch.setattr(type(ordinary.stores[0]), "restore", interrupt)
        patch.setattr(ordinary.streams.persistence, "commit", interrupt)
        with pytest.raises(KeyboardInterrupt):
            ordinary.write(chunk(2))
    for one in (ordinary, expected):
        one.write(chunk(3))
    assert_same(ordinary, expected)


# ---------------------------------------------------------------------- holes, and what only looks like one


def grown(tmp_path: Path, payloads: list[bytes], name: str = "journal-0123456789abcdef-0.bin") -> Path:
    """A journal of these records."""
    with Folder.open(tmp_path) as folder:
        journal = Journal.create(FileSystem(), folder / name)
        for payload in payloads:
            journal.append([payload])
        journal.close()
    return tmp_path / name


def read(path: Path) -> list[bytes]:
    return [bytes(payload) for payload, _ in records(path)]


NAMES = pytest.mark.parametrize("name", ["journal-0123456789abcdef-0.bin", "journal-0.bin"])


@NAMES
@pytest.mark.parametrize("hole", [100, 512, 700, 2000, 5120])
def test_records_behind_a_hole_are_damage_and_are_recovered(tmp_path: Path, name: str, hole: int) -> None:
    payloads = [bytes([n]) * (400 * n + 1) for n in range(1, 6)]
    path = grown(tmp_path, payloads, name)
    ends = [end for _, end in records(path)]
    data = path.read_bytes()
    path.write_bytes(data[: ends[1]] + bytes(hole) + data[ends[1] :])
    with pytest.raises(MemoryFileError, match=r"record 2 must be what was written|record 2 stands behind it"):
        read(path)
    assert [bytes(payload) for payload in recover_records(path)] == payloads
    path.write_bytes(data[: ends[1]] + bytes(hole) + data[ends[2] :])  # record 2 is gone
    with pytest.raises(MemoryFileError):
        read(path)
    found = []
    with pytest.raises(MemoryFileError, match="record 2"):
        found.extend(bytes(payload) for payload in recover_records(path))
    assert found == [] or found == payloads[:2]
    path.write_bytes(data[: ends[1]] + bytes(hole))
    assert read(path) == payloads[:2], "nothing stands behind it: it was never finished"


def test_a_payload_may_hold_what_looks_like_records(tmp_path: Path) -> None:
    """Marks, and whole records of this and other journals; also where the one that holds them was never finished."""
    other = grown(tmp_path, [b"x" * 900] * 9, "journal-fedcba9876543210-0.bin").read_bytes()
    old = grown(tmp_path, [b"x" * 900] * 9, "journal-5.bin").read_bytes()
    own = grown(tmp_path, [b"first" * 50, b"second"])
    earlier = own.read_bytes()
    own.unlink()
    payloads = [b"first" * 50, b"second", earlier, b"mplus-j2" * 900, b"mplus-j1" * 900, bytes(512) + old, other]
    path = grown(tmp_path, payloads)
    assert read(path) == payloads
    data, ends = path.read_bytes(), [end for _, end in records(path)]
    for begin, end in pairwise(ends):
        count = ends.index(begin) + 1
        for cut in range(begin + 1, end, 512):  # a torn record: its first sectors, or all but its first ones
            path.write_bytes(data[:cut])
            assert read(path) == payloads[:count]
            path.write_bytes(data[:begin] + bytes(cut - begin) + data[cut:end])
            if cut > begin + 512:
                assert read(path) == payloads[:count]


def test_a_journal_that_was_written_behind_a_hole_is_reported_and_repaired(tmp_path: Path) -> None:
    """As version 0.1.0.dev0 left them behind after a full disk."""
    memory, twin = written(tmp_path / "memory")
    size = memory.directory.journal.size
    for number in range(5):
        for one in (memory, twin):
            one.write(chunk(60 + number), source=f"{number}")
    killed(memory)
    journal = tmp_path / "memory" / memory.directory.journal.path.name
    data = journal.read_bytes()
    journal.write_bytes(data[:size] + bytes(2000) + data[size:])
    for opened in (lambda: Memory.open(tmp_path / "memory", MODEL), lambda: reopened(tmp_path / "memory", MODEL)):
        with pytest.raises(MemoryFileError, match=r"there is a hole at byte .*mplus memory repair"):
            opened()
    (fault,) = verify(tmp_path / "memory")
    assert "there is a hole" in fault
    assert repair(tmp_path / "memory", tmp_path / "out") == []
    assert_same(Memory.load(tmp_path / "out", MODEL), twin)


def children(path: Path, turns: int) -> Iterator[int]:
    """Children that write with faults of the disk in between, each killed; yields how many writes it was told of."""
    for turn in range(turns):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(reader)
                files = Failing()
                memory = open_memory(path, MODEL, files=files, journal_bytes=20_000)
                draw = random.Random(turn)
                while True:
                    number = memory.states[0].clock // 4
                    if draw.random() < 0.4:
                        files.fail(draw.randint(1, 3), lasting=False, late=draw.random() < 0.5)
                    try:
                        memory.write(chunk(number), source="a")
                        os.write(writer, b".")
                    except MemoryFileError:
                        pass
                    except LiveMemoryError:
                        break
                    files.heal()
                    if draw.random() < 0.1:
                        os.kill(os.getpid(), signal.SIGKILL)
            finally:
                os._exit(1)
        os.close(writer)
        with os.fdopen(reader, "rb") as told:
            acknowledged = len(told.read())
        os.waitpid(child, 0)
        yield acknowledged


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_processes_that_go_on_after_faults_and_are_killed(tmp_path: Path) -> None:
    Memory.open(tmp_path, MODEL).close()
    twin, chunks = MODEL.new_memory(), 0
    for acknowledged in children(tmp_path, 60 if NIGHTLY else 12):
        memory = reopened(tmp_path, MODEL)
        found = memory.states[0].clock // 4
        assert chunks + acknowledged <= found <= chunks + acknowledged + 1
        for number in range(chunks, found):
            twin.write(chunk(number), source="a")
        chunks = found
        assert_same(memory, twin)
    assert chunks > 12
