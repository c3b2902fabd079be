"""The programs in examples/ do what they say, on the decoders that come with mplus. (The README is the quickstart.)"""

from __future__ import annotations

import ast
import io
import json
import re
import runpy
import sys
from ast import literal_eval
from collections import Counter
from pathlib import Path

import pytest

from mplus.mechanisms import MECHANISMS
from mplus.retrievers import RETRIEVERS
from mplus.testing.mechanisms import MechanismConformance
from mplus.testing.retrievers import RetrieverConformance
from tests.helpers.examples import classes_of

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
FEWER_LINES_THAN = 60


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """A function that runs an example in an empty folder, with lines typed in, and returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(name, typed=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        capsys.readouterr()
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.stem)
def test_it_is_short_and_says_what_it_does(example):
    text = example.read_text(encoding="utf-8")
    assert len(text.splitlines()) < FEWER_LINES_THAN
    assert ast.get_docstring(ast.parse(text))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.stem)
def test_it_runs_on_what_is_shipped_and_says_where_another_decoder_goes(example):
    text = example.read_text(encoding="utf-8")
    assert re.search(r'"(stories260K|recall-tiny)"}?,?\)?  # or ', text)


def test_the_page_lists_all():
    page = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| `examples/(\w+)\.py` \|", page, re.MULTILINE)) == [one.stem for one in EXAMPLES]


def test_chat_knows_tomorrow_what_it_was_told(run):
    told = run("chat", "pet of ada baker owl .\n\ntown of bella becker oslo .\npet of ada baker\n")
    assert told.splitlines()[1:] == ["I will remember.", "I will remember.", "owl"]
    lines = run("chat", "town of bella becker\npet of bella becker").splitlines()
    assert lines[0].endswith("['pet of ada baker owl .', 'town of bella becker oslo .']")
    assert lines[1:] == ["oslo", "unknown"]


def test_a_chat_with_any_decoder_remembers_what_was_said(run):
    assert run("chat_with_a_memory", "Tom has a red ball.\n\n").startswith("I know of []\n")
    first, *rest = run("chat_with_a_memory", "Where is the red ball?").splitlines()
    (source,) = literal_eval(first.removeprefix("I know of "))
    assert source.startswith("chat 20")
    assert rest[-1] == f"  (from {source})"


def test_a_memory_in_a_folder_is_there_later_and_forgets(run, tmp_path):
    lines = run("disk_memory").splitlines()
    assert lines[0].startswith("Lily: 1501 tokens")
    assert lines[1].startswith("Tom: 1261 tokens")
    assert lines[2].startswith("One day, Lily")
    assert lines[3] == "left: ['Lily']"
    assert (tmp_path / "notes" / "manifest.json").is_file()


def test_users_share_the_handbook_and_nothing_else(run):
    assert run("many_users").splitlines() == [
        "anna: oslo owl; knows of ['handbook', 'anna']",
        "omar: oslo fox; knows of ['handbook', 'omar']",
        "yuki: oslo unknown; knows of ['handbook', 'yuki']",
        "anna, back again: owl oslo",
    ]


def test_training_takes_its_steps_and_leaves_a_model(run, tmp_path):
    *steps, story = run("train_lora").splitlines()
    assert [line.partition(":")[0] for line in steps] == [
        *(f"write-and-read, step {step}" for step in (2, 4, 6)),
        *(f"long-term, step {step}" for step in (8, 10, 12)),
    ]
    assert story.startswith("Mary opened the door")
    assert (tmp_path / "garden-run" / "model" / "model.safetensors").is_file()


def test_evaluation_finds_what_long_term_memory_is_worth(run, tmp_path):
    run("evaluate")
    arms = {
        arm["name"]: arm["accuracy_by_age"] for arm in json.loads((tmp_path / "retention.json").read_text())["arms"]
    }
    assert min(arms["mplus"].values()) >= 0.9
    assert arms["memoryllm"]["0"] >= 0.9
    assert max(arms[name]["64"] for name in ("none", "memoryllm", "mplus-random")) <= 0.2


@pytest.fixture
def without_cosine():
    yield
    RETRIEVERS.unregister("cosine")


def test_the_written_retriever_brings_back_what_the_text_is_about(run, without_cosine):
    about_the_dog, about_the_cake = (
        Counter(literal_eval(line.partition(" -> ")[2])) for line in run("write_a_retriever").splitlines()
    )
    assert about_the_dog.total() == about_the_cake.total() == 5 * 20, "layers, and rows that each brings back"
    assert about_the_dog["dog"] > 2 * about_the_dog["cake"]
    assert about_the_cake["cake"] > 2 * about_the_cake["dog"]


@pytest.fixture
def without_tokens():
    yield
    MECHANISMS.unregister("tokens")


def test_the_written_mechanism_keeps_a_row_for_every_token(run, without_tokens):
    said = run("write_a_mechanism")
    assert "rows per layer: [26 long-term]" in said
    assert said.strip().endswith("torch.Size([1, 7, 512])")


class TestCosineRetriever(RetrieverConformance):
    implementation = classes_of("write_a_retriever")["CosineRetriever"]


class TestTokenMemory(MechanismConformance):
    implementation = classes_of("write_a_mechanism")["TokenMemory"]
