"""Sources that are forgotten by the clock: as one change, whoever comes first, and on disk as in memory."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from typing import TYPE_CHECKING

import pytest

from mplus.errors import InputError
from mplus.memory import Memory
from mplus.memory.format.offline import saved_sources
from mplus.memory.writing.write import write_together
from tests.helpers.clock import NOON, Hands, noon
from tests.memory.disks.plain import PlainModel, chunk
from tests.memory.tiny import assert_content, assert_same, content

if TYPE_CHECKING:
    from pathlib import Path

MODEL = PlainModel()
DAY = timedelta(days=1)


def names(memory: Memory, row: int = 0) -> list[str | None]:
    return [source.name for source in memory.sources(row)]


def filled(memory: Memory) -> Memory:
    """``a`` expires after a day, ``b`` (in the second stream only) after two, ``c`` never."""
    memory.write([chunk(0), chunk(1)], source="a", expires=DAY)
    memory.write([None, chunk(2)], source="b", expires=datetime(2026, 12, 3, 14, tzinfo=timezone(2 * DAY / 24)))
    memory.write([chunk(3), chunk(4)], source="c")
    return memory


def test_what_is_due_is_forgotten_as_forget_does() -> None:
    clock = Hands()
    memory = filled(MODEL.new_memory(2, clock=clock))
    assert [source.expires for source in memory.sources(1)] == [NOON + DAY, NOON + 2 * DAY, None]
    clock.move(hours=23)
    before, version = content(memory), memory.version
    assert memory.expire() == []
    assert memory.version == version
    assert_content(memory, before)
    clock.move(hours=1)
    expected = memory.fork()
    assert memory.expire() == [expected.forget("a")]
    assert_same(memory, expected)
    assert [report.source for report in memory.expire(NOON + 3 * DAY)] == ["b"], "at the time that is given"
    assert [names(memory, row) for row in range(2)] == [["c"], ["c"]]


def test_it_can_be_put_off() -> None:
    clock = Hands()
    memory = MODEL.new_memory(clock=clock)
    memory.write(chunk(0), source="a", expires=DAY)
    memory.write(chunk(1), source="a")
    assert memory.sources()[0].expires == NOON + DAY, "nothing was said of it"
    memory.write(chunk(2), source="a", expires=2 * DAY)
    clock.move(days=1)
    assert memory.expire() == []
    clock.move(days=1)
    assert [report.chunks for report in memory.expire()] == [3]


@pytest.mark.parametrize("tokens", [8, 2])
@pytest.mark.parametrize("write", ["write", "write_pieces", "replace", "atomic", "once"])
def test_whatever_says_so(write: str, tokens: int) -> None:
    """Also of text that is too short for a chunk, and waits."""
    memory = PlainModel(min_chunk_tokens=4).new_memory(clock=noon)
    options = {"atomic": {"atomic": True}, "once": {"write_id": "w"}}.get(write, {})
    name, given = getattr(memory, write if hasattr(memory, write) else "write"), chunk(0)[:tokens]
    if write == "replace":
        name("a", given, expires=DAY)
    else:
        name([given] if write == "write_pieces" else given, source="a", expires=DAY, **options)
    assert [(source.tokens, source.expires) for source in memory.sources()] == [(tokens, NOON + DAY)]
    assert [(report.source, report.tokens) for report in memory.expire(NOON + DAY)] == [("a", tokens)]
    assert memory.states[0].tail == ()


@pytest.mark.parametrize("write", ["write", "write_pieces", "write_chunk", "write_together"])
def test_a_write_begins_with_it(write: str) -> None:
    clock = Hands()
    memory = MODEL.new_memory(clock=clock)
    memory.write(chunk(0), source="a", expires=DAY)
    clock.move(days=1)
    if write == "write_together":
        write_together([memory], [chunk(1)], ["b"])
    else:
        data = {"write": chunk(1), "write_pieces": [chunk(1)], "write_chunk": chunk(1)[None]}[write]
        getattr(memory, write)(data, source="b")
    assert names(memory) == ["b"]


def test_directories_and_saves(tmp_path: Path) -> None:
    clock = Hands()
    with Memory.open(tmp_path / "live", MODEL, batch_size=2, clock=clock) as memory:
        filled(memory)
        memory.save(tmp_path / "saved")
    clock.move(days=1)
    assert names(Memory.open(tmp_path / "live", MODEL, read_only=True, clock=clock)) == ["a", "c"], "it is not changed"
    with Memory.open(tmp_path / "live", MODEL, clock=clock) as memory:
        assert [names(memory, row) for row in range(2)] == [["c"], ["b", "c"]]
        assert [[one.name for one in row] for row in saved_sources(tmp_path / "live")] == [["c"], ["b", "c"]]
        clock.move(days=1)
        assert [report.source for report in memory.expire()] == ["b"]
        assert_same(Memory.open(tmp_path / "live", MODEL, read_only=True, clock=clock), memory)
    assert [names(Memory.load(tmp_path / "saved", MODEL, clock=clock), row) for row in range(2)] == [["c"], ["c"]]


@pytest.mark.parametrize("wrong", [datetime(2027, 1, 1), NOON, timedelta(0), -DAY, 5.0, timedelta(days=9_000_000)])  # noqa: DTZ001
def test_times_that_make_no_sense(wrong: object) -> None:
    memory = MODEL.new_memory()
    with pytest.raises(InputError, match="expires must be"):
        memory.write(chunk(0), source="a", expires=wrong)
    assert memory.sources() == []
    with pytest.raises(InputError, match="now must be a datetime with a timezone"):
        memory.expire(datetime(2027, 1, 1))  # noqa: DTZ001


def test_a_time_elsewhere_is_the_same_time() -> None:
    memory = MODEL.new_memory()
    memory.write(chunk(0), source="a", expires=datetime(2026, 12, 2, 3, tzinfo=timezone(timedelta(hours=3))))
    (source,) = memory.sources()
    assert (source.expires, source.expires.tzinfo) == (datetime(2026, 12, 2, tzinfo=UTC), UTC)
