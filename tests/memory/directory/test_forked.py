"""A child of the process that has a memory open: it keeps nothing locked, deadlocks nowhere, and changes nothing."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest

from mplus.errors import LiveMemoryError
from mplus.memory import Memory
from mplus.memory.format.folder import hold, lock
from mplus.stores.disk.files import FileSystem
from tests.memory.disks.disks import open_memory
from tests.memory.disks.plain import PlainModel, chunk, reopened
from tests.memory.tiny import assert_same, content, difference

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="forks"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]
MODEL = PlainModel()


def in_child(work: Callable[[], object]) -> int:
    """Fork; the child does ``work`` and says whether it came to its end. Returns its process id."""
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(20)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return child


def code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def lives_on() -> int:
    """A child that lives until it is killed."""
    return in_child(signal.pause)


def test_the_lock_ends_with_close_and_with_its_writer(tmp_path: Path) -> None:
    memory = Memory.open(tmp_path / "memory", MODEL)
    memory.write(chunk(1))
    child = lives_on()
    with pytest.raises(LiveMemoryError, match=f"is by process {os.getpid()}"):
        Memory.open(tmp_path / "memory", MODEL)
    memory.close()
    Memory.open(tmp_path / "memory", MODEL).close()
    reader, writer = os.pipe()

    def write_and_die() -> None:
        held = Memory.open(tmp_path / "memory", MODEL)
        held.write(chunk(2))
        os.write(writer, f"{lives_on()}\n".encode())
        os.kill(os.getpid(), signal.SIGKILL)

    assert code(in_child(write_and_die)) == -signal.SIGKILL
    grandchild = int(os.read(reader, 20))
    with Memory.open(tmp_path / "memory", MODEL) as again:
        assert again.states[0].clock == 8
    for process in (child, grandchild):
        os.kill(process, signal.SIGKILL)
    code(child)
    os.close(reader)
    os.close(writer)


def test_a_save_is_not_locked_by_a_child(tmp_path: Path) -> None:
    MODEL.new_memory().save(tmp_path / "saved")
    folder = hold(tmp_path / "saved")
    held = lock(folder)
    child = lives_on()
    held.release()
    folder.close()
    MODEL.new_memory().save(tmp_path / "saved")
    os.kill(child, signal.SIGKILL)
    code(child)


def test_a_child_reads_forks_saves_and_opens_but_does_not_write(tmp_path: Path) -> None:
    memory = Memory.open(tmp_path / "memory", MODEL)
    for number in range(8):
        memory.write(chunk(number), source="a")
    held = content(memory)
    journal = memory.directory.journal.size

    def work() -> None:
        assert difference(content(memory), held) == []
        for change in (lambda: memory.write(chunk(9)), lambda: memory.forget("a"), memory.checkpoint):
            with pytest.raises(LiveMemoryError, match="this is a fork of it"):
                change()
        other = memory.fork()
        other.write(chunk(9))
        other.save(tmp_path / "saved")
        with pytest.raises(LiveMemoryError, match=f"is by process {os.getppid()}"):
            Memory.open(tmp_path / "memory", MODEL)
        with Memory.open(tmp_path / "other", MODEL) as new:
            new.write(chunk(1))
        memory.close()

    assert code(in_child(work)) == 0
    assert memory.directory.journal.path.stat().st_size == journal
    memory.write(chunk(9), source="a")
    with pytest.raises(LiveMemoryError):
        Memory.open(tmp_path / "memory", MODEL)
    assert_same(reopened(tmp_path / "memory", MODEL), memory)
    assert Memory.load(tmp_path / "saved", MODEL).states[0].clock == memory.states[0].clock


@pytest.mark.parametrize("change", ["write", "forget"])
def test_forked_in_the_middle_of_a_change_of_another_thread(tmp_path: Path, change: str) -> None:
    """The child sees the memory as it was before; its parent's change goes on."""
    begun, go_on = threading.Event(), threading.Event()

    class Waiting(FileSystem):
        wait = False

        def sync(self, handle: int) -> None:
            if self.wait:
                begun.set()
                go_on.wait(20)
            super().sync(handle)

    files = Waiting()
    memory = open_memory(tmp_path, MODEL, files=files)
    for number in range(8):
        memory.write(chunk(number), source="ab"[number % 2])
    held, twin = content(memory), memory.fork()
    work: Any = {"write": lambda one: one.write(chunk(20)), "forget": lambda one: one.forget("a")}[change]
    files.wait = True
    writer = threading.Thread(target=work, args=(memory,))
    writer.start()
    assert begun.wait(20)

    def look() -> None:
        assert difference(content(memory), held) == []
        memory.snapshot()
        other = memory.fork()
        assert difference(content(other), held) == []
        other.write(chunk(30))

    child = in_child(look)
    assert code(child) == 0
    files.wait = False
    go_on.set()
    writer.join()
    work(twin)
    assert_same(memory, twin)
    assert_same(reopened(tmp_path, MODEL), twin)


def test_a_child_does_not_take_scratch_files_away(tmp_path: Path) -> None:
    from mplus.config import Component

    memory = MODEL.new_memory(store=Component("mmap", {"bytes_in_memory": 1, "directory": str(tmp_path / "scratch")}))
    temporary = MODEL.new_memory(store=Component("mmap", {"bytes_in_memory": 1}))
    for one in (memory, temporary):
        for number in range(8):
            one.write(chunk(number))
    held = content(memory)
    before = sorted((tmp_path / "scratch").iterdir())
    both = [memory, temporary]

    def let_go() -> None:
        nonlocal memory, temporary
        both.clear()
        del memory, temporary

    assert before
    assert code(in_child(let_go)) == 0
    assert sorted((tmp_path / "scratch").iterdir()) == before
    for one in both:
        assert difference(content(one), held) == []
        one.write(chunk(9))
