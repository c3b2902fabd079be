"""The README is true: its program runs, its numbers are those of the record, what it names is there."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

from benchmarks.records import load
from mplus.backends import BACKENDS
from mplus.evaluation.reports.report import ARMS
from mplus.eviction import EVICTION
from mplus.mechanisms import MECHANISMS
from mplus.retrievers import RETRIEVERS
from mplus.retrievers.chunks import CHUNK_RETRIEVERS
from mplus.stores import STORES
from mplus.training.data import SOURCES
from mplus.training.objectives import OBJECTIVES

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLE = ROOT / "examples" / "quickstart.py"
REGISTRIES = {
    "store": STORES,
    "eviction": EVICTION,
    "retriever": RETRIEVERS,
    "chunk retriever": CHUNK_RETRIEVERS,
    "backend": BACKENDS,
    "mechanism": MECHANISMS,
    "objective": OBJECTIVES,
    "data": SOURCES,
}


def program() -> str:
    (block,) = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return block


def test_its_program_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(program(), "README.md", "exec"), {"__name__": "readme"})
    assert "One day, Lily" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["lily.memory"]


def test_its_program_is_the_example():
    example = ast.parse(EXAMPLE.read_text(encoding="utf-8"))
    assert isinstance(example.body[0], ast.Expr), "a docstring, which the README tells in its text"
    example.body = example.body[1:]
    assert ast.dump(ast.parse(program())) == ast.dump(example)


def test_make_demo_leaves_the_tree_as_it_was():
    """What it keeps goes into a temporary folder; the figure of --recall is not drawn."""
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").partition("\ndemo:")[2].partition("\n\n")[0]
    assert recipe.splitlines()[1:] == ["\t$(VENV)/bin/mplus demo"]


def test_the_novel_was_continued_the_same_in_a_new_process():
    assert load("speed", "demo")["saved"]["identical"] is True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_make_target_exists(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"demo", "test"} <= targets
    named = set(re.findall(r"(?:`|^    )make ([a-z-]+)", page.read_text(encoding="utf-8"), re.MULTILINE))
    assert named <= targets


def test_every_extra_exists_and_is_listed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(re.findall(r"`mplus\[([a-z0-9-]+)\]`", README)) == project["optional-dependencies"].keys()


def test_the_table_has_every_implementation():
    rows = re.findall(r"^\| \[`([\w-]+)`\]\(([^)]+)\) \| ([a-z ]+)(, plug-in)? \|", README, re.MULTILINE)
    listed = {(kind, name) for name, _, kind, plug_in in rows if not plug_in}
    ours = {
        (kind, name)
        for kind, registry in REGISTRIES.items()
        for name in registry.names()
        if registry.origin(name).startswith("mplus (")
    }
    assert listed == ours
    assert {file for _, file, _, plug_in in rows if plug_in} == {
        f"plugins/{folder.name}" for folder in (ROOT / "plugins").iterdir() if (folder / "pyproject.toml").is_file()
    }


def test_it_names_every_arm():
    (paragraph,) = [text for text in README.split("\n\n") if text.startswith("`mplus eval retention` measures")]
    assert set(re.findall(r"`([a-z0-9-]+)`", paragraph)) == set(ARMS)


def test_every_file_it_links_exists():
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / target).exists(), target
