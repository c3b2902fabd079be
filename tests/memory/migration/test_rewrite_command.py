"""``mplus memory rewrite``: a memory for another decoder, from the text that the old one keeps."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING, Any

import torch
from typer.testing import CliRunner

import mplus
from mplus.cli import app
from mplus.hf.pretrained.shipped import load_decoder, load_tokenizer
from tests.memory import tiny

if TYPE_CHECKING:
    from pathlib import Path

STORIES = str(files("mplus") / "data" / "stories260K")
KEY = "The key is under the blue stone in the garden."


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["memory", "rewrite", *map(str, arguments)], env={"COLUMNS": "140"})


def test_for_the_next_release_of_a_decoder(tmp_path: Path) -> None:
    decoder = load_decoder()
    memory = mplus.wrap(load_decoder(), {"mechanism": "kv"}).new_memory(tokenizer=load_tokenizer())
    memory.write(KEY, source="key")
    memory.save(tmp_path / "old")
    with torch.no_grad():
        for weight in decoder.parameters():
            weight.mul_(1.01)
    decoder.save_pretrained(tmp_path / "next")
    load_tokenizer().save_pretrained(tmp_path / "next")
    asked = run(tmp_path / "old", tmp_path / "new", "--model", tmp_path / "next")
    assert (asked.exit_code, "pass old_tokenizer=" in asked.stderr) == (2, True)
    assert not (tmp_path / "new").exists()
    result = run(tmp_path / "old", tmp_path / "new", "--model", tmp_path / "next", "--old-tokenizer", STORIES)
    assert result.exit_code == 0, result.stderr
    assert "tokens of 1 sources, written anew for" in result.stdout
    model = mplus.wrap(load_decoder(), {"mechanism": "kv"})
    model.load_state_dict(decoder.state_dict())
    new = mplus.Memory.load(tmp_path / "new", model, tokenizer=load_tokenizer())
    assert new.text("key") == memory.text("key")
    assert new.search("Where is the key?")[0].source == "key"


def test_for_the_same_decoder_no_tokenizer_is_asked_for(tmp_path: Path) -> None:
    model = mplus.wrap(load_decoder(), {"mechanism": "kv"})
    with mplus.Memory.open(tmp_path / "old", model, tokenizer=load_tokenizer()) as memory:
        memory.write(KEY, source="key")
    assert run(tmp_path / "old", tmp_path / "new", "--model", STORIES).exit_code == 0
    assert mplus.Memory.open(tmp_path / "new", model, read_only=True).sources()[0].name == "key"


def test_what_has_no_text_is_named(tmp_path: Path) -> None:
    tiny.written("paper", [60]).save(tmp_path / "old")
    result = run(tmp_path / "old", tmp_path / "new", "--model", STORIES, "--mechanism", "kv")
    assert result.exit_code == 2
    assert "keeps no text of what was written to batch row 0 ('first', 'zweite Quelle')" in result.stderr
