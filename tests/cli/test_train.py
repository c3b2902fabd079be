"""``mplus train``: from a file to a folder, and on from there."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from mplus.cli import app
from mplus.cli.training.train import parse
from mplus.errors import ConfigError

RECIPE = """
name = "facts"
streams = 2
[model]
tokenizer = "recall"
[model.build]
model_type = "llama"
hidden_size = 16
intermediate_size = 16
num_hidden_layers = 1
num_attention_heads = 2
num_key_value_heads = 2
[memory]
chunk_tokens = 12
min_chunk_tokens = 4
memory_tokens_per_chunk = 2
short_term_tokens = 6
long_term_tokens = 8
retrieved_tokens = 2
retriever = {name = "linear", width = 4}
adapters = false
[optimizer]
parameters = "all"
[data.facts]
kind = "recall"
chunk_tokens = 12
[[stages]]
name = "only"
steps = 6
objectives = [{name = "single_context", data = "facts"}]
[stages.until]
metric = "accuracy"
at_least = 0.0
window = 4
[dry_run.set]
"stages.0.steps" = 4
"""


@pytest.fixture(autouse=True)
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "facts.toml").write_text(RECIPE, encoding="utf-8")
    return tmp_path / "facts.toml"


def run(*arguments):
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


def test_a_recipe_from_the_command_line(recipe):
    done = run(recipe, "--json", "--seed", 5, "--set", "optimizer.learning_rate=1e-4", "--set", "stages.*.steps=5")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["seed"], found["restarts"], found["folder"]) == (5, 0, "runs/facts")
    assert found["stages"] == [{"name": "only", "steps": 4, "metric": "accuracy", "value": 0.0, "reached": True}]
    assert (recipe.parent / "runs/facts/recipe.toml").read_text() == RECIPE
    resolved = json.loads((recipe.parent / "runs/facts/recipe.json").read_text())
    assert (resolved["optimizer"]["learning_rate"], resolved["stages"][0]["steps"]) == (1e-4, 5)
    again = run("--resume", "runs/facts")
    assert again.exit_code == 0, again.output
    assert "stage only: 4 steps, accuracy 0.000" in again.stdout
    assert "wrote runs/facts (the decoder with its memory is in runs/facts/model)" in again.stdout


def test_a_dry_run_and_a_cap(recipe):
    found = json.loads(run(recipe, "--dry-run", "--steps", 2, "--out", "here", "--json").stdout)
    assert (found["steps"], found["folder"]) == (2, "here")


def test_the_list():
    assert "recall-tiny" in run("--list").stdout.split()
    assert "llama3-8b-stage3" in json.loads(run("--list", "--json").stdout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "a recipe must be given, or a run to resume, got neither: mplus train --list shows recipes"),
        (("facts.toml", "--set", "seed"), "--set must be PATH=VALUE, got 'seed'"),
        (("facts.toml", "--set", "streams=many"), "streams must be a whole number of at least 1, got 'many'"),
        (("facts.toml", "--set", "data.facts.question=2"), "'question' is not a field of RecallOptions; did you mean"),
        (("recall-tin",), "got 'recall-tin'; did you mean 'recall-tiny'"),
        (("--resume", "nowhere"), "nowhere must be the folder of a run, with recipe.json"),
        (("facts.toml", "--out", "a", "--resume", "b"), "one of out and resume must be given, got 'a' and 'b'"),
    ],
)
def test_mistakes_end_with_one_line(arguments, message):
    done = run(*arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.startswith("mplus: ")
    assert done.stderr.count("\n") == 1


def test_values_are_toml_or_text():
    assert parse(["a.b=1e-3", "c=[1, 'x']", "d=true", "e=some text", "f=a=b", "g='1'"]) == {
        "a.b": 1e-3,
        "c": [1, "x"],
        "d": True,
        "e": "some text",
        "f": "a=b",
        "g": "1",
    }
    with pytest.raises(ConfigError, match="--set must be PATH=VALUE, got '=1'"):
        parse(["=1"])
