"""``mplus memory show`` and ``mplus memory verify`` on a memory of the shipped decoder."""

from __future__ import annotations

import json
import shutil

import pytest
from typer.testing import CliRunner

import mplus
from mplus.cli import app
from mplus.hf.pretrained.shipped import load_decoder, load_tokenizer

LAYERS, ROWS = 5, 8


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    config = mplus.MPlusConfig(
        chunk_tokens=32,
        min_chunk_tokens=8,
        memory_tokens_per_chunk=ROWS,
        short_term_tokens=2 * ROWS,
        retrieved_tokens=ROWS,
        retriever={"name": "linear", "width": 16},
        adapters=None,
    )
    memory = mplus.wrap(load_decoder(), config).new_memory(tokenizer=load_tokenizer())
    folder = tmp_path_factory.mktemp("saved") / "memory"
    memory.write("Lily had a red ball. She liked to play with it in the park with her friend Ben. " * 3, "Lily [red]")
    memory.write("Tom saw a big dog and was scared, but the dog only wanted to play.", "Tom")
    memory.save(folder)
    return folder, memory


def run(*arguments):
    return CliRunner().invoke(app, ["memory", *map(str, arguments)], env={"COLUMNS": "120"})


def test_show(saved):
    folder, memory = saved
    result = run("show", folder)
    assert result.exit_code == 0, result.output
    written = memory.states[0].clock
    kept = 2 * ROWS
    assert (
        f"{kept} short-term, 0 pending, {written - kept} long-term rows per layer, {written} written" in result.stdout
    )
    assert f"{LAYERS} layers of width 64, retriever keys of width 16, float32" in result.stdout
    assert f"mplus {mplus.__version__}" in result.stdout
    lines = [line.split() for line in result.stdout.splitlines()]
    for source in memory.sources():
        assert [*source.name.split(), str(source.tokens), str(source.chunks)] in lines


def test_show_as_json(saved):
    folder, memory = saved
    facts = json.loads(run("show", folder, "--json").stdout)
    [stream] = facts["streams"]
    assert stream["stm"] == [2 * ROWS] * LAYERS
    assert stream["ltm"] == [memory.stores[0].count(layer) for layer in range(LAYERS)]
    assert stream["clock"] == memory.states[0].clock
    assert [source["name"] for source in stream["sources"]] == ["Lily [red]", "Tom"]
    assert facts["layout"]["dtype"] == "float32"
    assert facts["data"]["bytes"] == (folder / facts["data"]["file"]).stat().st_size
    assert facts["data"]["tensors"] > LAYERS * 3 * 2


def test_verify(saved):
    folder, _ = saved
    result = run("verify", folder)
    assert result.exit_code == 0, result.output
    assert f"{folder} is sound" in result.stdout


@pytest.mark.parametrize("place", [-1, 4000])
def test_verify_finds_one_changed_byte(saved, tmp_path, place):
    folder = shutil.copytree(saved[0], tmp_path / "memory")
    [data] = folder.glob("*.safetensors")
    content = bytearray(data.read_bytes())
    content[place] ^= 1
    data.write_bytes(content)
    result = run("verify", folder)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert data.name in result.stderr
    assert "fault" in result.stderr.splitlines()[-1]


def test_verify_something_else(tmp_path):
    result = run("verify", tmp_path)
    assert result.exit_code == 1
    assert "manifest.json is missing" in result.stderr
