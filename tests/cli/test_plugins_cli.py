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
ANNOUNCED = """
from pathlib import Path
from mplus.interop.golden import TracePlayer
tiny = Path(__file__).with_name("some-file.toml")
class Player(TracePlayer):
    quantities = ("value",)
    def __len__(self):
        return 1
    def play(self, report, *, reset=False):
        report.demand("value", "step 0", self.folder.name, "case")
        yield
"""
RECIPE = """
name = "whatever"
streams = 2
memory = { chunk_tokens = 16, min_chunk_tokens = 4, adapters = { rank = 2 } }
model = { path = "stories260K" }
data.novel = { kind = "documents", shipped = "novel", chunk_tokens = 16, target_tokens = 16 }
[[stages]]
name = "one"
steps = 1
objectives = [{ name = "plain_lm", data = "novel" }]
"""
ENTRY_POINTS = """
[mplus.retrievers]
mine = working_plugin:Mine
broken = broken_plugin:Nothing
unreadable line

[mplus.stores]
foreign = working_plugin:Mine

[mplus.recipes]
some-tiny = announced:tiny

[mplus.replays]
somebody = announced:Player
"""


@pytest.fixture
def site(tmp_path):
    """A folder on the path with a distribution, some of whose plug-ins are broken."""
    (tmp_path / "working_plugin.py").write_text(WORKING)
    (tmp_path / "announced.py").write_text(ANNOUNCED)
    (tmp_path / "some-file.toml").write_text(RECIPE)
    (tmp_path / "broken_plugin.py").write_text("raise RuntimeError('not today')")
    info = tmp_path / "some_package-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-package\nVersion: 1.5\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    return tmp_path


def mplus(site, *arguments):
    """A process of its own: registries look for plug-ins once."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)]), "COLUMNS": "200"}
    command = [sys.executable, "-m", "mplus.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=site).stdout


def plugins(site, *options):
    return mplus(site, "plugins", *options)


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
    assert listed["recipe", "some-tiny"]["origin"] == "some-package 1.5 (announced:tiny)"
    assert listed["trace player", "somebody"]["origin"] == "some-package 1.5 (announced:Player)"
    assert not listed["recipe", "some-tiny"]["error"]
    assert not listed["trace player", "somebody"]["error"]


@pytest.fixture
def sound(site):
    """The same without the line that no tool can read, at which transformers stops."""
    file = site / "some_package-1.5.dist-info" / "entry_points.txt"
    file.write_text(file.read_text().replace("unreadable line\n", ""))
    return site


@pytest.mark.nightly  # tests/docs/test_plugin_tutorial.py trains by the recipe of a package for every change
def test_a_recipe_of_a_package_is_trained_by_its_name(sound):
    assert json.loads(mplus(sound, "train", "some-tiny", "--json"))["folder"] == "runs/some-tiny"


def test_a_case_is_played_by_the_player_of_a_package(sound):
    (sound / "case").mkdir()
    (sound / "case" / "steps.json").write_text('{"model": "somebody"}')
    assert "case: passed, 1 steps replayed" in mplus(sound, "replay", sound / "case")


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
    assert {"mplus", "memoryllm", "ram", "fifo", "linear", "random", "reference", "sdpa", "recall-tiny"} <= {
        entry["name"] for entry in built_in
    }
    assert not [entry for entry in built_in if entry["error"]]
    assert {entry["kind"] for entry in listed} == {registry.kind for registry in registries()}
