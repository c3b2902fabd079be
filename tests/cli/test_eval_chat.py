"""``mplus eval notes`` and the others on the smallest chat model: what is printed and written, and what is refused."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from mplus.cli import app
from mplus.cli.eval_chat import TOLD
from mplus.evaluation.chat.sizes import SIZES
from mplus.evaluation.reports.report import Report
from tests.evaluation import data
from tests.evaluation.chat.small import KV, decoder, tokenizer

MEMORY = str(KV).replace("'", '"')


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "tiny"
    decoder().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def own_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(*arguments):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)], env={"COLUMNS": "100", "TERM": "dumb"})


def test_notes(folder, tmp_path):
    sizes = ("--set", "notes=4", "--set", "facts=2", "--set", "questions=2", "--tokens", 2, "--timed", 1)
    result = run(
        *("notes", "--model", folder, "--memory", MEMORY, "--arms", "none,kv,kv-text,ceiling", *sizes, "--threads", 1),
        *("--json", tmp_path / "r.json", "--markdown", tmp_path / "r.md", "--directory", tmp_path / "memories"),
    )
    assert result.exit_code == 0, result.output
    report = Report.load(tmp_path / "r.json")
    assert [arm.name for arm in report.arms] == ["none", "ceiling", "kv", "kv-text"]
    assert report.settings["protocol"]["notes"] == 4
    assert report.settings["memory"]["kv"]["chunk_tokens"] == 64
    assert report.settings["generation"]["tokens"] == 2
    assert report.circumstances["model"] == "tiny"
    digest = report.settings["memory"]["kv"]["digest"]
    for text in (result.stdout, (tmp_path / "r.md").read_text()):
        for name in ("of the ceiling", "kv-text", "2 ", digest, "torch"):
            assert name in text


def prepared(protocol, folder):
    """Tiny data for a protocol, as options of its command."""
    folder.mkdir(exist_ok=True)
    if protocol == "squad":
        return "--data", data.squad(folder / "squad.json")
    if protocol == "natural-questions":
        return "--data", data.natural_questions(folder / "nq.jsonl.gz"), "--set", "answer_tokens=20"
    novels = data.novels(folder / "novels")
    if protocol == "needles":
        return "--data", novels, "--set", "lengths=[80]", "--set", "depths=[0,1]", "--set", "passage_tokens=60"
    if protocol == "babi":
        return "--data", data.babi(folder / "babi.txt"), "--set", f"novels={novels}", "--set", "split=all"
    return "--set", "categories=[4,5]", "--set", "sessions=1"


@pytest.mark.parametrize("protocol", sorted(TOLD.keys() - {"notes"}))
def test_every_protocol(protocol, folder, tmp_path):
    sizes = ("--memory", MEMORY, "--arms", "none,kv,ceiling", "--tokens", 1, "--timed", 0, "--threads", 1)
    result = run(protocol, "--model", folder, *sizes, *prepared(protocol, tmp_path), "--json", tmp_path / "r.json")
    assert result.exit_code == 0, result.output
    report = Report.load(tmp_path / "r.json")
    assert (report.protocol, {arm.status for arm in report.arms}) == (protocol, {"ok"})
    assert report.arm("kv").cells[0].recall is not None
    assert ("by_category" in report.arm("kv").details) == (protocol in {"needles", "conversations"})
    assert ("untold" in report.arm("kv").details) == (protocol == "conversations")


def test_what_is_refused(folder, tmp_path):
    for arguments, error in (
        (("notes", "--model", tmp_path / "nowhere"), "must be a decoder with its tokenizer"),
        (("notes", "--model", folder, "--memory", "nothing"), "nothing"),
        (("notes", "--model", folder, "--size", "huge"), "must be one of small, asked, changing, among, got 'huge'"),
        (("squad", "--model", folder), "mplus eval squad needs --data"),
        (("notes", "--model", folder, "--memory", MEMORY, "--arms", "mplus"), "got mplus"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2
        assert error in result.output.replace("\n", " ")


def test_every_command_has_sizes():
    assert TOLD.keys() == SIZES.keys()
    assert all({"small", "asked"} <= sizes.keys() for sizes in SIZES.values())
