"""Sources have a time, by a clock that can be given, wherever the memory is kept."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from mplus.errors import InputError
from mplus.memory import Memory
from tests.helpers.clock import NOON, Hands
from tests.memory.disks.plain import PlainModel, chunk

if TYPE_CHECKING:
    from pathlib import Path


def times(memory: Memory) -> dict[str | None, tuple[datetime | None, datetime | None]]:
    return {source.name: (source.written, source.last_written) for source in memory.sources()}


def test_first_and_last_writing(tmp_path: Path) -> None:
    clock, model = Hands(), PlainModel()
    later, last = NOON + timedelta(hours=1), NOON + timedelta(hours=3)
    with Memory.open(tmp_path / "live", model, keep_text=True, clock=clock) as memory:
        memory.write(chunk(0), source="a")
        clock.move(hours=1)
        memory.write(chunk(1), source="b")
        memory.write(chunk(2))
        clock.move(hours=2)
        memory.write(chunk(3), source="a")
        expected = {"a": (NOON, last), "b": (later, later), None: (later, later)}
        assert times(memory) == expected
        assert times(Memory.open(tmp_path / "live", model, read_only=True)) == expected, "by its journal"
        memory.save(tmp_path / "saved")
    assert times(Memory.open(tmp_path / "live", model, read_only=True)) == expected, "by its checkpoint"
    saved = Memory.load(tmp_path / "saved", model, clock=clock)
    assert times(saved) == times(saved.fork()) == times(saved.select([0])) == expected
    clock.move(hours=1)
    fork = saved.fork()
    fork.forget("b", mode="rebuild")
    assert times(fork) == {"a": (NOON, last), None: (later, later)}, "writing the others anew leaves their times"
    fork.write(chunk(4), source="b")
    assert times(fork)["b"] == (clock.now, clock.now), "a fork goes by the same clock"


def test_a_name_that_was_kept_is_written_again() -> None:
    clock = Hands()
    memory = PlainModel().new_memory(clock=clock)
    memory.write(chunk(0), source="a")
    memory.forget("a", keep_name=True)
    clock.move(days=1)
    memory.write(chunk(0), source="a")
    assert times(memory) == {"a": (clock.now, clock.now)}


@pytest.mark.parametrize("wrong", [datetime(2026, 1, 1), 12.0])  # noqa: DTZ001
def test_a_clock_without_a_timezone_is_refused(wrong: object) -> None:
    with pytest.raises(InputError, match="clock of a memory returns must be a datetime with a timezone"):
        PlainModel().new_memory(clock=lambda: wrong)
