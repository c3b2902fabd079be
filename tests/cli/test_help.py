"""Help texts, what they cost, and how errors end a command."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

import mplus
from mplus.cli import app
from mplus.cli.eval_chat import TOLD

COMMANDS = {
    "bench",
    "chat",
    "demo",
    "demo-novel",
    "eval",
    "get",
    "import",
    "info",
    "keys",
    "memory",
    "plugins",
    "replay",
    "serve",
    "train",
    "train-retriever",
}
ENV = {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1", "_TYPER_FORCE_DISABLE_TERMINAL": "1"}


def commands(command, path=()):
    """Every command and group below ``command`` with its path, itself included."""
    yield path, command
    for name, sub in getattr(command, "commands", {}).items():
        yield from commands(sub, (*path, name))


ALL = dict(commands(typer.main.get_command(app)))


def run(*arguments):
    return CliRunner().invoke(app, list(arguments), env=ENV)


def test_the_commands():
    assert {path[0] for path in ALL if path} == COMMANDS | {"demo-continue", "demo-reopen"}
    grouped = {
        "memory": {"expire", "forget", "pin", "repair", "rewrite", "show", "sources", "text", "unpin", "verify"},
        "eval": {"abstention", "harm", "retention", "retriever", *TOLD},
    }
    grouped["keys"] = {"list", "make", "revoke"}
    grouped["bench"] = {"attention", "decode", "read", "score", "store", "write"}
    assert {path for path in ALL if len(path) == 2} == {(group, name) for group in grouped for name in grouped[group]}


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_help_shows_every_option(path):
    result = run(*path, "--help")
    assert result.exit_code == 0, result.output
    for parameter in ALL[path].params:
        shown = parameter.opts if parameter.param_type_name == "option" else [parameter.name]
        for name in shown:
            assert name.lower() in result.output.lower(), f"{name} of {path}"


@pytest.mark.parametrize("path", [path for path, command in ALL.items() if not command.hidden], ids=" ".join)
def test_everything_is_explained(path):
    assert ALL[path].help
    for parameter in ALL[path].params:
        assert getattr(parameter, "help", None), f"{parameter.name} of {path} has no help"


def test_the_overview_lists_what_people_may_call():
    listed = {line.split()[1] for line in run("--help").output.splitlines() if line.startswith("│ ")}
    assert listed >= COMMANDS
    assert "demo-continue" not in listed


def test_the_limits_that_the_help_of_the_demo_names():
    assert "x>=512" in run("demo-novel", "--help").output
    assert run("demo-novel", "--tokens", "511").exit_code == 2
    assert run("demo", "--threads", "0").exit_code == 2


def test_version():
    assert run("--version").output.strip() == mplus.__version__


def test_help_imports_nothing_heavy():
    code = (
        "import json, sys\n"
        "from mplus.cli import main\n"
        "sys.argv = ['mplus', *json.loads(sys.argv[1])]\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    for command in ((), ("demo",), ("memory", "show"), ("import",), ("eval", "retention"), ("bench", "read")):
        arguments = [*command, "--help"]
        result = subprocess.run(
            [sys.executable, "-c", code, json.dumps(arguments)], capture_output=True, text=True, check=True
        )
        loaded = set(json.loads(result.stdout.splitlines()[-1]))
        assert "typer" in loaded
        assert not {"torch", "transformers", "peft", "numpy", "safetensors"} & loaded, arguments


def test_an_error_is_one_line(tmp_path):
    result = run("memory", "show", str(tmp_path / "nothing"))
    assert result.exit_code == 2
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith("mplus: ")
    assert str(tmp_path / "nothing") in line


def test_debug_shows_where_an_error_comes_from(tmp_path):
    result = run("--debug", "memory", "show", str(tmp_path / "nothing"))
    assert result.exit_code == 2
    assert result.stderr.startswith("Traceback")
    assert "MemoryFileError" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("mplus: ")


def test_python_m_mplus_cli():
    command = [sys.executable, "-m", "mplus.cli", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == mplus.__version__
