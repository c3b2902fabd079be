"""The memory of format version 3 that is kept with the tests is read as it was written."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from attrs import evolve

import mplus
from mplus.memory.format.manifest import VERSION, read_manifest
from mplus.memory.format.verify import verify
from tests.fixtures import make_memory_v1, make_memory_v2, make_memory_v3
from tests.helpers.clock import NOON
from tests.memory import tiny

if TYPE_CHECKING:
    from pathlib import Path

NOW = NOON.timestamp()


@pytest.fixture(scope="module")
def memory() -> mplus.Memory:
    return mplus.Memory.load(make_memory_v3.FOLDER, make_memory_v1.build_model())


def test_it_is_of_the_present_version() -> None:
    assert read_manifest(make_memory_v3.FOLDER).version == VERSION == 3
    assert verify(make_memory_v3.FOLDER) == []


def test_sources_say_when_they_were_written(memory: mplus.Memory) -> None:
    """What else they say is that of version 2."""
    earlier = mplus.Memory.load(make_memory_v2.FOLDER, make_memory_v1.build_model())
    for new, old in zip(memory.states, earlier.states, strict=True):
        for number, source in list(new.sources.items())[:-1]:
            assert source.last_time == (NOW if source.chunks else None)
            assert source.time == (NOW if source.chunks and source.name != "Märchen" else old.sources[number].time)
            assert evolve(source, time=old.sources[number].time, last_time=None) == old.sources[number]
    assert [source.last_written for source in memory.sources()] == [NOON] * 4
    assert [source.last_written for source in earlier.sources()] == [None] * 3


def test_a_write_with_an_id_goes_on(memory: mplus.Memory) -> None:
    (record,) = memory.states[0].writes
    assert (record.write_id, record.chunks, record.is_finished) == ("schreiben-2 é", 1, False)
    assert [record.is_finished for record in memory.states[1].writes] == [True]
    report = memory.fork().write(**make_memory_v3.WRITE)
    assert (report.tokens, report.chunks) == ([20, 8], [3, 1])


def test_it_is_saved_again(memory: mplus.Memory, tmp_path: Path) -> None:
    memory.save(tmp_path)
    tiny.assert_same(mplus.Memory.load(tmp_path, make_memory_v1.build_model()), memory)
