"""``mplus plugins``: the implementations of mplus and of other packages, broken ones too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mplus.cli import app
from mplus.cli.plugins import registries

ROOT = Path(__file__).parent.parent.parent

WORKING = """
from mplus.retrievers.random import RandomRetriever
class Mine(RandomRetriever):
    name = "mine"
"""
ENTRY_POINTS = """
[mplus.retrievers]
mine = working_plugin:Mine
broken = broken_plugin:Nothing
unreadable line

[mplus.stores]
foreign = working_plugin:Mine
"""


@pytest.fixture
def site(tmp_path):
    """A folder on the path with a distribution, some of whose plug-ins are broken."""
    (tmp_path / "working_plugin.py").write_text(WORKING)
    (tmp_path / "broken_plugin.py").write_text("raise RuntimeError('not today')")
    info = tmp_path / "some_package-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-package\nVersion: 1.5\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    return tmp_path


def plugins(site, *options):
    """A process of its own: registries look for plug-ins once."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)]), "COLUMNS": "200"}
    command = [sys.executable, "-m", "mplus.cli", "plugins", *options]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def test_plugins_of_others_are_listed_with_origin_and_error(site):
    listed = {(entry["kind"], entry["name"]): entry for entry in json.loads(plugins(site, "--json"))}
    assert listed["retriever", "mine"] == {
        "kind": "retriever",
        "name": "mine",
        "origin": "some-package 1.5 (working_plugin:Mine)",
        "error": None,
    }
    assert "not today" in listed["retriever", "broken"]["error"]
    assert "must read name = module:attribute" in listed["retriever", "unreadable line"]["error"]
    assert "must be a subclass of mplus.stores.base:MemoryStore" in listed["store", "foreign"]["error"]
    assert listed["store", "ram"]["error"] is None


def test_the_table_ends_with_what_is_broken(site):
    lines = plugins(site).splitlines()
    assert any(line.split()[:2] == ["retriever", "mine"] for line in lines)
    assert any(line.split()[:2] == ["retriever", "broken"] for line in lines)
    [heading] = [number for number, line in enumerate(lines) if "3 cannot be used" in line]
    errors = "\n".join(lines[heading:])
    assert "not today" in errors
    assert "mine" not in errors


def test_everything_built_in_works():
    listed = json.loads(CliRunner().invoke(app, ["plugins", "--json"]).stdout)
    built_in = [entry for entry in listed if entry["origin"].startswith("mplus (")]
    assert {"mplus", "memoryllm", "ram", "fifo", "linear", "random", "reference", "sdpa"} <= {
        entry["name"] for entry in built_in
    }
    assert not [entry for entry in built_in if entry["error"]]
    assert {entry["kind"] for entry in listed} == {registry.kind for registry in registries()}
