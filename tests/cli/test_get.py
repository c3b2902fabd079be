"""``mplus get smollm2-mplus``: trains once, goes on where it was stopped, and prints the folder; its demo."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

import mplus.training
from mplus.cli import app
from mplus.hf.pretrained.shipped import STORIES260K

if TYPE_CHECKING:
    from mplus.training import TrainingResult


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder in which another decoder goes by the name of SmolLM2."""
    monkeypatch.setenv("MPLUS_CACHE", str(tmp_path))
    shutil.copytree(STORIES260K, tmp_path / "smollm2")
    return tmp_path


class Training:
    """Stands for ``mplus.training.train``: the dry run of the recipe, stopped once at a checkpoint."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.real = mplus.training.train

    def __call__(self, recipe: str, **given: Any) -> TrainingResult | None:
        self.calls.append(given)
        if len(self.calls) == 1:
            (given["out"] / "checkpoints" / "00-000000001").mkdir(parents=True)
            raise KeyboardInterrupt
        shutil.rmtree(given["resume"])
        return self.real(recipe, out=given["resume"], dry_run=True, steps=1, progress=False)


def test_a_training_that_was_stopped_goes_on_and_is_done_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training()
    monkeypatch.setattr(mplus.training, "train", training, raising=False)
    run = cache / "smollm2-mplus-training"
    stopped = CliRunner().invoke(app, ["get", "smollm2-mplus"])
    assert stopped.exit_code
    assert "minutes on one core" in stopped.stderr
    assert training.calls == [{"out": run, "resume": None}]
    for _ in range(2):
        result = CliRunner().invoke(app, ["get", "smollm2-mplus"])
        assert result.exit_code == 0, result.output
        assert result.stdout.splitlines()[-1] == str(cache / "smollm2-mplus")
    assert training.calls[1:] == [{"out": None, "resume": run}]
    assert not run.exists()
    model = mplus.from_pretrained(cache / "smollm2-mplus")
    assert model.mplus_config.mechanism.options["rows"] == "inputs"


def test_the_demo_of_mplus_wants_the_trained_one(cache: Path) -> None:
    result = CliRunner().invoke(app, ["demo", "--mechanism", "mplus", "--json"])
    assert result.exit_code
    assert "`mplus get smollm2-mplus` trains it on this machine" in result.output


def test_it_is_not_on_the_hub() -> None:
    result = CliRunner().invoke(app, ["get", "smollm2-mplus", "--from", "hub"])
    assert result.exit_code
    assert "--from goes with smollm2" in result.output
