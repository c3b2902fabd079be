"""Sources of memories on disk expire, are pinned and read by commands, without the decoder."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
import torch
from typer.testing import CliRunner

import mplus
from mplus.cli import app
from mplus.errors import NotSupported
from mplus.memory.format.verify import verify
from mplus.memory.state import PlainState
from tests.helpers.clock import noon
from tests.mechanisms.text.decoders import CAT, KEY, llama, tokenizer
from tests.memory import tiny

if TYPE_CHECKING:
    from pathlib import Path

CONFIGS = {
    "kv": {"mechanism": "kv", "chunk_tokens": 32, "retrieved_tokens": 64},
    "notes": {"mechanism": "notes", "chunk_tokens": 32},
}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest) -> Any:
    return mplus.wrap(copy.deepcopy(llama()), CONFIGS[request.param], check=False)


@pytest.fixture(params=["live", "saved"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, model: Any) -> Path:
    """``garden`` expires after a day in the first stream; ``house`` is in both."""
    with mplus.Memory.open(tmp_path / "live", model, batch_size=2, tokenizer=tokenizer(), clock=noon) as memory:
        memory.write([KEY, None], source="garden", expires=timedelta(days=1))
        memory.write([CAT, CAT], source="house")
        memory.save(tmp_path / "saved")
    return tmp_path / request.param


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["memory", *map(str, arguments)], env={"COLUMNS": "140"})


def test_expire(folder: Path) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert run("expire", folder, "--now", "2026-12-02T11:59:59").stdout == "nothing has expired\n"
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert "2026-12-02 12:00" in run("sources", folder).stdout
    result = run("expire", folder, "--now", "2026-12-02T12:00:00")
    assert result.stdout.startswith("forgot 'garden': ")
    assert "garden" not in run("sources", folder).stdout
    assert verify(folder) == []


def test_pin_and_unpin(folder: Path) -> None:
    assert run("pin", folder, "house", "--stream", 1).stdout == "pinned 'house'\n"
    assert run("sources", folder).stdout.count("(pinned)") == 1
    assert run("pin", folder, "house").exit_code == 0
    assert run("sources", folder).stdout.count("(pinned)") == 2
    assert run("unpin", folder, "house").exit_code == 0
    assert "(pinned)" not in run("sources", folder).stdout
    assert run("pin", folder, "nothing").exit_code != 0
    assert run("pin", folder).exit_code != 0


def test_nothing_is_pinned_that_would_leave_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, changes in (("memoryllm", {"mechanism": "memoryllm"}), ("none", {"long_term_tokens": 0}), ("mplus", {})):
        with mplus.Memory.open(tmp_path / name, tiny.build(**changes)) as memory:
            memory.write(torch.arange(2, 30), source="house")
            with pytest.raises(NotSupported, match="so that none can be pinned") if changes else nullcontext():
                memory.pin("house")
            memory.unpin("house")
            memory.save(tmp_path / f"saved {name}")
    for name in ("memoryllm", "saved memoryllm", "saved none"):
        before = {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
        assert "without an eviction policy" in str(run("pin", tmp_path / name, "house").stderr)
        assert run("unpin", tmp_path / name, "house").exit_code == 0
        assert {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} == before
    assert run("pin", tmp_path / "saved mplus", "house").exit_code == 0
    monkeypatch.setattr("mplus.memory.format.offline.state_class", lambda name: PlainState)
    assert "install its package" in run("pin", tmp_path / "mplus", "house").stderr


def test_text(folder: Path, model: Any) -> None:
    with_tokenizer = ["--tokenizer", "stories260K"] if model.mplus_engine.mechanism.name == "kv" else []
    assert run("text", folder, "garden", *with_tokenizer).stdout.strip() == KEY
    assert run("text", folder, "house", "--stream", 1, *with_tokenizer).stdout.strip() == CAT
    for wrong in (["garden", "--stream", 1], ["house", "--stream", 2], ["house", "--unnamed"]):
        assert run("text", folder, *wrong, *with_tokenizer).exit_code != 0
    if with_tokenizer:
        assert "by a tokenizer" in run("text", folder, "house").stderr
