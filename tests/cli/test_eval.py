"""``mplus eval`` on the shipped decoder, untrained, with tiny files: what is printed and written."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import mplus
from mplus.cli import app
from mplus.cli.eval_options import assignment, numbers
from mplus.errors import ConfigError
from mplus.evaluation.reports.report import ARMS, Report
from mplus.hf.pretrained.shipped import load_decoder, load_tokenizer
from tests.evaluation import data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved decoder with memory and its tokenizer, and a file of pairs."""
    folder = tmp_path_factory.mktemp("eval")
    config = mplus.MPlusConfig(
        chunk_tokens=48,
        min_chunk_tokens=4,
        memory_tokens_per_chunk=4,
        short_term_tokens=8,
        retrieved_tokens=4,
        long_term_tokens=64,
        retriever={"name": "linear", "width": 4},
        adapters=None,
    )
    torch.manual_seed(0)
    model = mplus.wrap(load_decoder(), config, check=False)
    model.save_pretrained(folder / "model", save_base=True)
    load_tokenizer().save_pretrained(folder / "model")
    data.key_value(folder / "kv.jsonl.gz", records=8)
    return folder


def run(*arguments):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)], env={"COLUMNS": "100", "TERM": "dumb"})


def common(folder, *more):
    sizes = ("--set", "passages=4", "--set", "pairs=2", "--episodes", 2, "--tokens", 2, "--threads", 1)
    return ("--model", folder / "model", "--protocol", "key-value", "--data", folder / "kv.jsonl.gz", *sizes, *more)


@pytest.fixture(autouse=True)
def own_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_retention(folder, tmp_path):
    files = {name: tmp_path / name for name in ("r.json", "r.png", "r.svg", "r.md", "q.jsonl")}
    result = run(
        "retention", *common(folder), "--ages", "0,3", "--json", files["r.json"], "--plot", files["r.png"], "--plot",
        files["r.svg"], "--markdown", files["r.md"], "--export", files["q.jsonl"], "--stop", r"\n", "--stop", ";",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = Report.load(files["r.json"])
    assert [arm.name for arm in report.arms] == [*ARMS, "ceiling"]
    assert report.arm("mplus").at(3).questions == 2
    assert report.settings["scoring"]["stop"] == ["\n", ";"]
    assert report.settings["protocol"]["passage_tokens"] == 48
    assert report.settings["generation"]["eos"] == [2]
    for text in (result.stdout, files["r.md"].read_text()):
        for name in ("mplus-random", "snapkv: skipped", "protocol.pairs", "generation.tokens"):
            assert name in text
    assert files["r.png"].stat().st_size
    assert b"<svg" in files["r.svg"].read_bytes()
    assert json.loads(files["q.jsonl"].read_text().splitlines()[0])["digest"]


def test_harm(folder, tmp_path):
    (tmp_path / "held_out.txt").write_text("Once upon a time there was a little girl. " * 40)
    (tmp_path / "other.txt").write_text("The engine of the ship was loud and the sea was dark. " * 40)
    result = run(
        "harm", "--model", folder / "model", "--text", tmp_path / "held_out.txt", "--unrelated",
        tmp_path / "other.txt", "--text-tokens", 40, "--known-tokens", 8, "--pieces", 3, "--json", tmp_path / "h.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "h.json").read_text())
    assert report["kind"] == "harm"
    assert set(report["change_percent"]) == {"empty", "unrelated"}
    assert f"perplexity.none: {json.dumps(report['perplexity']['none'])}" in result.stdout


def test_retriever(folder, tmp_path):
    result = run(
        "retriever", *common(folder), "--ages", "3", "--retrieved-tokens", "2,4", "--json", tmp_path / "h.json"
    )
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "h.json").read_text())
    assert list(report["by_retrieved_tokens"]) == ["2", "4"]
    assert {"own", "attention", "centroid", "faiss_ivf", "random"} <= set(report["by_retrieved_tokens"]["4"])
    assert "by_retrieved_tokens.4.random.accuracy" in result.stdout


def test_retrievers_that_are_asked_for(folder, tmp_path):
    some = ("--retriever", "random,centroid", "--retriever", "faiss_ivf  least=3 cells=2 probes=2")
    given = (*common(folder), "--ages", "3", "--retrieved-tokens", "2", "--json", tmp_path / "h.json")
    result = run("retriever", *given, *some)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "h.json").read_text())["by_retrieved_tokens"]["2"]
    indexed = "faiss_ivf least=3 cells=2 probes=2"
    assert list(found) == ["own", "random", "centroid", indexed]
    for name in ("own", "centroid", indexed):
        assert found[name]["overlap_with_exact_by_layer"] == [1.0] * len(found[name]["overlap_with_exact_by_layer"])
        assert all(taken > 0 for taken in found[name]["select_ms_by_layer"])
    assert {index["cells"] for index in found[indexed]["index_by_layer"]} == {2}
    assert run("retriever", *given, "--retriever", " ,random").exit_code != 0


def test_abstention(folder, tmp_path):
    result = run("abstention", *common(folder), "--ages", "3", "--json", tmp_path / "a.json")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "a.json").read_text())
    assert {"entropy", "best_score"} <= set(report["features"])
    assert "combined.auroc" in result.stdout


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("command", ["retention", "retriever", "abstention", "harm"])
def test_in_a_narrow_dtype(command, dtype, folder, tmp_path):
    """Refused before: what memory does was held against the tolerance for errors."""
    text, other = tmp_path / "text.txt", tmp_path / "other.txt"
    text.write_text("Once upon a time there was a little girl. " * 40)
    other.write_text("The engine of the ship was loud and the sea was dark. " * 40)
    pieces = ("--text", text, "--unrelated", other, "--text-tokens", 40, "--known-tokens", 8, "--pieces", 2)
    given = {
        "harm": ("--model", folder / "model", *pieces),
        "retention": (*common(folder), "--ages", "3", "--arms", "mplus"),
        "retriever": (*common(folder), "--ages", "3", "--retrieved-tokens", "2", "--retriever", "random"),
        "abstention": (*common(folder), "--ages", "3"),
    }
    result = run(command, *given[command], "--dtype", dtype)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--set", "passage=4"), "'passage' is not a field of KeyValue.Options; did you mean 'passages'"),
        (("--set", "passages"), "--set must be NAME=VALUE, got 'passages'"),
        (("--set", "passages=0"), "passages must be a whole number of at least 1, got 0"),
        (("--ages", "0,x"), "--ages must be whole numbers with commas between, got '0,x'"),
        (("--arms", "mplus,magic"), "got 'magic'"),
        (("--protocol", "trivia"), "a protocol must be one of squad"),
        (("--correct", "maybe"), "correct must be one of 'contains'"),
        (("--plot", "curve.pdf"), "a path ending in .png or .svg, got curve.pdf"),
        (("--dtype", "float8"), "dtype must be one of auto, float32"),
        (("--data", "nothing.gz"), "nothing.gz must be a readable UTF-8 text"),
        (("--tokenizer", "/nowhere"), "must have a tokenizer with it"),
    ],
)
def test_bad_settings_are_one_line(folder, more, message):
    result = run("retention", *common(folder, *more))
    assert result.exit_code == 2, result.output
    [line] = result.stderr.strip().splitlines()
    assert line.startswith("mplus: ")
    assert message in line


def test_values_of_options():
    assert assignment("passages=4") == ("passages", 4)
    assert assignment("prompt=Q: {question} = A:") == ("prompt", "Q: {question} = A:")
    assert assignment('separator="\\n"') == ("separator", "\n")
    assert assignment("avoid_answers=false") == ("avoid_answers", False)
    assert numbers(None, "--x") is None
    assert numbers("1, 2", "--x") == (1, 2)
    with pytest.raises(ConfigError, match="--x must be whole numbers"):
        numbers("", "--x")


@pytest.mark.parametrize("command", ["retention", "retriever", "abstention"])
@pytest.mark.parametrize(
    "more",
    [
        ("--data", "pairs.gz"),
        ("--protocol", "babi"),
        ("--set", "passages=3"),
        ("--episodes", "100"),  # what it would be anyway: it was given all the same
        ("--tokenizer", "words"),
        ("--device", "cpu"),
        ("--dtype", "float32"),
        ("--tokens", "3"),
        ("--streams", "8"),
    ],
)
def test_options_of_a_data_set_are_refused_with_a_recipe(command, more):
    result = run(command, "--recipe", "recall-tiny", *more)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"mplus: {more[0]}: about a data set: give --model and --data instead of --recipe")


def test_options_of_the_language_are_refused_with_a_data_set(folder):
    result = run("retention", *common(folder, "--questions", "5", "--held-out"))
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("mplus: --questions, --held-out: about facts of the little language: give --recipe")
