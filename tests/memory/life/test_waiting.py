"""Waiting for a directory that is open elsewhere: in this process, in another one, and until it is deleted."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import TYPE_CHECKING

import pytest

from mplus.errors import ConfigError, LiveMemoryError
from mplus.memory import Memory
from mplus.memory.directory.removal import delete_memory
from tests.memory.disks.plain import PlainModel, chunk
from tests.memory.tiny import content, difference

if TYPE_CHECKING:
    from pathlib import Path

MODEL = PlainModel()


def later(work: object, seconds: float = 0.1) -> threading.Timer:
    timer = threading.Timer(seconds, work)
    timer.start()
    return timer


def test_the_next_one_of_this_process_gets_it_as_it_is_closed(tmp_path):
    memory = Memory.open(tmp_path, MODEL)
    memory.write(chunk(1))
    held = content(memory)
    timer = later(memory.close)
    with Memory.open(tmp_path, MODEL, wait=60) as again:
        timer.join()
        assert difference(content(again), held) == []
        again.write(chunk(2))


def test_the_next_one_gets_it_as_another_process_ends(tmp_path):
    Memory.open(tmp_path, MODEL).close()
    begun, ready = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            memory = Memory.open(tmp_path, MODEL)
            memory.write(chunk(1))
            os.write(ready, b".")
            time.sleep(60)
        finally:
            os._exit(1)
    assert os.read(begun, 1) == b"."
    with pytest.raises(LiveMemoryError, match=f"by process {child}"):
        Memory.open(tmp_path, MODEL, wait=0.01)
    timer = later(lambda: os.kill(child, signal.SIGKILL))
    with Memory.open(tmp_path, MODEL, wait=60) as memory:
        assert memory.states[0].clock == 4, "what the other wrote"
    timer.join()
    os.waitpid(child, 0)
    os.close(begun)
    os.close(ready)


def test_it_gives_up_in_time_and_at_once_where_nothing_is_said(tmp_path):
    with Memory.open(tmp_path, MODEL):
        for options in ({}, {"wait": 0}, {"wait": 0.05}):
            with pytest.raises(LiveMemoryError, match=f"by process {os.getpid()}"):
                Memory.open(tmp_path, MODEL, **options)
        assert Memory.open(tmp_path, MODEL, read_only=True, wait=60).states[0].clock == 0, "readers wait for nobody"
        for wait in (-1, float("nan"), True, "3", None):
            with pytest.raises(ConfigError, match="wait must be seconds, 0 or more, got"):
                Memory.open(tmp_path, MODEL, wait=wait)
    Memory.open(tmp_path, MODEL, wait=float("inf")).close()


def test_a_wait_can_be_interrupted_and_leaves_no_lock(tmp_path):
    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with Memory.open(tmp_path, MODEL):
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(KeyboardInterrupt):
                Memory.open(tmp_path, MODEL, wait=60)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    Memory.open(tmp_path, MODEL).close()


def test_whoever_waits_for_one_that_is_deleted_makes_a_new_one(tmp_path):
    path: Path = tmp_path / "anna"
    memory = Memory.open(path, MODEL)
    memory.write(chunk(1))
    deleted = threading.Event()

    def delete() -> None:
        memory.directory.folder.path.rename(tmp_path / "moved")  # as a deletion does while it holds the lock
        deleted.set()
        memory.directory.close()

    timer = later(delete)
    with Memory.open(path, MODEL, wait=60) as new:
        timer.join()
        assert deleted.is_set()
        assert new.is_empty
        new.write(chunk(2))
    with Memory.open(tmp_path / "moved", MODEL) as old:
        assert not old.is_empty
    delete_memory(path)
