"""What is asked of a memory in a directory, and taken out of it, without its decoder."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import attrs
import pytest
import torch
from typer.testing import CliRunner

from mplus.cli import app
from mplus.errors import InputError, LiveMemoryError, MemoryFileError
from mplus.memory import Memory
from mplus.memory.directory.checkpoint_manifest import read_live_manifest
from mplus.memory.format.offline import forget_saved, saved_sources
from mplus.memory.format.verify import verify
from tests.helpers.clock import NOON
from tests.memory import tiny
from tests.memory.disks.disks import Failing
from tests.memory.disks.plain import CONFIGS, PlainModel, chunk, reopened
from tests.memory.tiny import assert_same, content, difference

if TYPE_CHECKING:
    from pathlib import Path

    from mplus.memory.report import SourceInfo


def written(path: Path, model: PlainModel, **options: object) -> Memory:
    """Two streams and three sources, rows in every tier, a checkpoint and a journal behind it."""
    memory = Memory.open(path, model, batch_size=2, keep_text=True, **options)
    for number in range(9):
        memory.write(torch.stack([chunk(number), chunk(number + 40)]), source=["a", "b", None][number % 3])
        if number == 6:
            memory.checkpoint()
    return memory


def run(*arguments: object):
    return CliRunner().invoke(app, ["memory", *map(str, arguments)], env={"COLUMNS": "140"})


def in_rows(source: SourceInfo) -> SourceInfo:
    """Its ages in chunks as in rows: this decoder's fingerprint does not say how many rows a chunk has."""
    return attrs.evolve(source, newest_age_chunks=source.newest_age, oldest_age_chunks=source.oldest_age)


@pytest.mark.parametrize("config", CONFIGS)
def test_sources_are_those_the_memory_lists(tmp_path, config):
    memory = written(tmp_path, PlainModel(**CONFIGS[config]))
    expected = [[in_rows(source) for source in memory.sources(row)] for row in range(2)]
    assert saved_sources(tmp_path) == expected, "beside the one that writes"
    result = run("sources", tmp_path, "--json")
    assert json.loads(result.stdout) == [
        [
            {
                **attrs.asdict(source),
                "written": NOON.isoformat(),
                "last_written": NOON.isoformat(),
            }
            for source in stream
        ]
        for stream in expected
    ]


def test_short_term_ages_of_the_mechanism_count_as_in_the_memory(tmp_path):
    memory = Memory.open(tmp_path, tiny.variant("published"))
    for number, name in enumerate(("first", "second", None)):
        memory.write(tiny.ids(60, number), name)
    assert saved_sources(tmp_path) == [memory.sources()]


@pytest.mark.parametrize("row", [None, 1])
@pytest.mark.parametrize("config", CONFIGS)
def test_forgetting_is_what_the_open_memory_does(tmp_path, config, row):
    model = PlainModel(**CONFIGS[config])
    memory = written(tmp_path / "one", model)
    memory.directory.close()  # as if it had been killed
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    other = Memory.open(tmp_path / "other", model)
    report = forget_saved(tmp_path / "one", "b", row)
    assert report == other.forget("b", row)
    assert report.rows > 0
    assert_same(reopened(tmp_path / "one", model), other)
    assert verify(tmp_path / "one") == []
    again = Memory.open(tmp_path / "one", model)
    for one in (again, other):
        one.write(torch.stack([chunk(3), chunk(4)]), source="c")
    assert_same(again, other)


def test_nothing_of_it_is_left_on_disk(tmp_path):
    model = PlainModel()
    memory = written(tmp_path, model)
    store, state = memory.stores[0], memory.states[0]
    rows = store.gather(0, store.ids(0))
    secret = [bytes(tiny.raw(row)) for row in rows.hidden[rows.source == 1]]
    secret += [bytes(tiny.raw(row)) for row in state.stm[0].hidden[state.stm[0].source == 1]]
    memory.directory.close()

    def on_disk() -> int:
        whole = b"".join(file.read_bytes() for file in tmp_path.iterdir())
        return sum(row in whole for row in secret)

    assert on_disk() == len(secret) > 4
    forget_saved(tmp_path, "b")
    assert on_disk() == 0


def test_when_rows_were_retrieved_stays_known(tmp_path):
    model = tiny.variant("paper")
    with Memory.open(tmp_path, model, eviction="lru") as memory:
        for number in range(6):
            memory.write(tiny.ids(40, number), "ab"[number % 2])
        with torch.no_grad():
            model(tiny.prompts(1), memory=memory)
    forget_saved(tmp_path, "b")
    again = Memory.open(tmp_path, model, read_only=True)
    ids = again.stores[0].ids(0)
    assert 0 < len(ids) < len(memory.stores[0].ids(0))
    times = again.snapshot()[0].access_log.times(0, ids)
    assert len(times.unique()) > 1
    assert torch.equal(times, memory.snapshot()[0].access_log.times(0, ids))


def test_mistakes_change_nothing(tmp_path):
    memory = written(tmp_path, PlainModel())
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(LiveMemoryError, match="may be open for writing once"):
        forget_saved(tmp_path, "a")
    memory.directory.close()
    with pytest.raises(InputError, match=r"one of this memory's sources \('a', 'b', None\), got 'nobody'"):
        forget_saved(tmp_path, "nobody")
    with pytest.raises(InputError, match="the stream must be one of 0 to 1, got 2"):
        forget_saved(tmp_path, "a", 2)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_disk_that_fails_at_any_call_leaves_it_as_it_was_or_without_the_source(tmp_path):
    model = PlainModel()
    memory = written(tmp_path / "made", model)
    memory.directory.close()
    whole = content(memory)
    shutil.copytree(tmp_path / "made", tmp_path / "done")
    forget_saved(tmp_path / "done", "b", None)
    less = content(reopened(tmp_path / "done", model))
    files, outcomes = Failing(), set()
    for at in range(1, 200):
        path = shutil.copytree(tmp_path / "made", tmp_path / "tried", dirs_exist_ok=False)
        files.fail(at, lasting=at % 2 == 0, late=at % 3 == 0)
        try:
            forget_saved(path, "b", files=files)
        except MemoryFileError as error:
            outcomes.add("error")
            if "could not be removed" in str(error):  # forgotten all the same
                outcomes.add("left")
                assert difference(content(reopened(path, model)), less) == []
            elif at % 2:  # it failed once, and could clean up
                left = {file.name for file in path.iterdir() if not file.name.endswith(".new")} - {
                    "lock",
                    "manifest.json",
                }
                assert left <= read_live_manifest(path).files
        assert verify(path) == []
        found = content(reopened(path, model))
        kept = difference(found, whole) == []
        assert kept or difference(found, less) == []
        outcomes.add(kept)
        shutil.rmtree(path)
        if not files.failed:
            break
    assert outcomes == {"error", "left", True, False}
    assert not files.failed


def test_show_and_forget_as_commands(tmp_path):
    memory = written(tmp_path, PlainModel(), bytes_budget="1MB")
    result = run("show", tmp_path)
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["journal", "2", "records", "since", "the", "last", "checkpoint,"] in [line[:7] for line in lines]
    assert ["texts", "kept"] in lines
    state, store = memory.states[1], memory.stores[1]
    rows = f"{len(state.stm[0])} short-term, {len(state.pending[0])} pending, {store.count(0)} long-term rows per layer"
    assert f"stream 1: {rows}, {state.clock} written" in result.stdout
    facts = json.loads(run("show", tmp_path, "--json").stdout)
    assert facts["streams"][1]["clock"] == state.clock
    assert facts["journal"]["records"] == 2
    assert facts["bytes"] == sum(file.stat().st_size for file in tmp_path.glob("*-*"))
    refused = run("forget", tmp_path, "a")
    assert refused.exit_code != 0
    assert "may be open for writing once" in refused.stderr
    memory.directory.close()
    report = memory.fork().forget("a", 0)
    result = run("forget", tmp_path, "a", "--stream", "0")
    assert result.exit_code == 0, result.output
    assert f"{report.tokens} tokens in {report.chunks} chunks" in result.stdout
    assert "a" not in [source.name for source in saved_sources(tmp_path)[0]]
    assert "a" in [source.name for source in saved_sources(tmp_path)[1]]
