"""``mplus train-retriever``: from a text to a memory that is searched by it."""

from __future__ import annotations

import gzip
import json

import pytest
import torch
from typer.testing import CliRunner

import mplus
from mplus.cli import app
from mplus.errors import CheckpointError
from mplus.hf.pretrained.shipped import STORIES260K, load_decoder
from tests.chat.conftest import tokenizer  # noqa: F401 - a fixture

NOVEL = STORIES260K.parent / "novels" / "Burnett_Garden_1911.txt.gz"


@pytest.fixture
def decoder(tmp_path, tokenizer):  # noqa: F811 - a fixture
    load_decoder().save_pretrained(tmp_path / "decoder")
    tokenizer.save_pretrained(tmp_path / "decoder")
    with gzip.open(NOVEL, "rt", encoding="utf-8") as novel:
        (tmp_path / "text.txt").write_text(novel.read()[20_000:70_000], encoding="utf-8")
    return tmp_path / "decoder"


def run(*arguments):
    return CliRunner().invoke(app, ["train-retriever", *map(str, arguments)], env={"COLUMNS": "200"})


def test_from_a_text_to_answers(tmp_path, decoder, tokenizer):  # noqa: F811 - a fixture
    out = tmp_path / "retriever"
    options = (decoder, "--text", tmp_path / "text.txt", "--out", out, "--passages", 60, "--steps", 20, "--rank", 4)
    done = run(*options)
    assert done.exit_code == 0, done.output
    assert "hybrid with trained" in done.stdout
    assert "hybrid with these maps " in done.stdout
    assert f"wrote {out / 'maps.safetensors'}" in done.stdout
    report = json.loads((out / "report.json").read_text())
    assert report["recall"].keys() >= {"words", "hidden", "hybrid", "trained", "hybrid with trained"}
    assert report["recall"]["trained"]["over_hybrid_at_1"].keys() == {"value", "low", "high"}
    files = {file: file.stat().st_mtime_ns for file in (out / "pooled").iterdir()}
    again = json.loads(run(*options, "--json").stdout)
    assert again["recall"] == report["recall"]
    assert {file: file.stat().st_mtime_ns for file in (out / "pooled").iterdir()} == files

    retriever = {"name": "hybrid", "path": str(out / "maps.safetensors")}
    model = mplus.wrap(load_decoder(), mplus.MPlusConfig(mechanism="kv", retriever=retriever))
    memory = model.new_memory(tokenizer=tokenizer)
    for text in ("Tim has a red car.", "Lily saw a big dog in the park.", "Mom made a cake."):
        memory.write(text)
    assert memory.search("Who saw a dog in the park?", 1)[0].text == "Lily saw a big dog in the park."

    # The file goes along with the model, wherever that is moved to.
    model.save_pretrained(tmp_path / "saved", save_base=True)
    (out / "maps.safetensors").unlink()
    (tmp_path / "saved").rename(tmp_path / "moved")
    loaded = mplus.from_pretrained(tmp_path / "moved")
    memory.save(tmp_path / "memory")
    found = mplus.Memory.load(tmp_path / "memory", loaded, tokenizer=tokenizer).search("Who saw a dog?", 3)
    assert [one.score for one in found] == [one.score for one in memory.search("Who saw a dog?", 3)]
    loaded.save_pretrained(tmp_path / "moved", save_base=True)  # over the file that its maps were read from

    other = load_decoder()
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
    other = mplus.wrap(other, mplus.MPlusConfig(mechanism="kv", retriever=loaded.mplus_config.retriever))
    with pytest.raises(CheckpointError, match="must be of the decoder that it is used with"):
        other.new_memory(tokenizer=tokenizer)


def test_what_cannot_be_trained_on_is_refused(tmp_path, decoder):
    assert "something to train on must be given" in run(decoder).stderr
    (tmp_path / "short.txt").write_text("Too short. It is. Really.", encoding="utf-8")
    done = run(decoder, "--text", tmp_path / "short.txt", "--out", tmp_path / "out")
    assert (done.exit_code, "must give at least 20 passages" in done.stderr) == (2, True)
    assert "cannot be loaded as a decoder" in run(tmp_path / "nowhere", "--text", tmp_path / "short.txt").stderr
