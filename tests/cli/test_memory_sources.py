"""``mplus memory sources`` and ``mplus memory forget``, and what ``show`` says of capacity and texts."""

from __future__ import annotations

import json
import shutil

import attrs
import pytest
from typer.testing import CliRunner

import mplus
from mplus.cli import app
from tests.helpers.clock import NOON
from tests.memory import tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    memory = tiny.variant("paper").new_memory(keep_text=True, bytes_budget="60kB")
    for number, name in enumerate(("first [x]", "second", None)):
        memory.write(tiny.ids(120, number), name)
    folder = tmp_path_factory.mktemp("saved") / "memory"
    memory.save(folder)
    return folder, memory


def run(*arguments):
    return CliRunner().invoke(app, ["memory", *map(str, arguments)], env={"COLUMNS": "140"})


def test_sources(saved):
    folder, memory = saved
    result = run("sources", folder)
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    for source in memory.sources():
        name = (source.name or "(no name)").split()
        rows = [f"{n:.1f}" for n in source.held.values()]
        ages = [f"{source.newest_age}-{source.oldest_age}", f"{source.newest_age_chunks}-{source.oldest_age_chunks}"]
        assert [*name, str(source.tokens), str(source.chunks), *rows, *ages, "2026-12-01", "12:00"] in lines
    assert json.loads(run("sources", folder, "--json").stdout) == [
        [{**attrs.asdict(s), "written": NOON.isoformat(), "last_written": NOON.isoformat()} for s in memory.sources()]
    ]


def test_text_that_waits_is_told(saved, tmp_path):
    memory = saved[1].fork()
    memory.write(tiny.ids(3), "chat")
    memory.save(tmp_path)
    listed = run("sources", tmp_path).stdout.splitlines()
    assert listed[1].split()[:4] == ["source", "tokens", "waiting", "chunks"]
    assert next(line.split()[:4] for line in listed if line.split()[0] == "chat") == ["chat", "3", "3", "0"]
    assert ["chat", "3", "0"] in [line.split() for line in run("show", tmp_path).stdout.splitlines()]


def test_show_tells_what_fits(saved):
    folder, memory = saved
    shown = run("show", folder).stdout
    fits = f"{memory.capacity} long-term rows per layer, the rows of {memory.text_capacity} text tokens"
    assert f"{fits} (budget 58.6 KiB)" in shown
    assert ["texts", "kept"] in [line.split() for line in shown.splitlines()]


@pytest.mark.parametrize(("arguments", "name"), [(("first [x]",), "first [x]"), (("--unnamed",), None)])
def test_forget(saved, tmp_path, arguments, name):
    folder, memory = shutil.copytree(saved[0], tmp_path / "memory"), saved[1].fork()
    result = run("forget", folder, *arguments)
    assert result.exit_code == 0, result.output
    report = memory.forget(name)
    assert f"{report.tokens} tokens in {report.chunks} chunks" in result.stdout
    tiny.assert_same(mplus.Memory.load(folder, tiny.variant("paper")), memory)
    assert run("verify", folder).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nobody",), r"'second', None), got 'nobody'"),
        ((), "give the name of a source or --unnamed"),
        (("second", "--unnamed"), "give the name of a source or --unnamed"),
        (("second", "--stream", "1"), "the stream must be one of 0 to 0, got 1"),
    ],
)
def test_forget_refuses(saved, arguments, message):
    folder = saved[0]
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    result = run("forget", folder, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr or "one of this memory's sources" in result.stderr
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
