"""Checkpoints: going on as if nothing had happened, and what happens when one cannot be written or read."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import shutil

import pytest
import torch

from mplus.errors import CheckpointError, TrainingError
from mplus.training import checkpoint as module
from mplus.training import train
from mplus.training.checkpoint import CheckpointStore, RunIdentity, read, write
from mplus.training.trainer import Trainer
from tests.training.recipes import recipe

FACTS = RunIdentity(recipe={"a": 1}, base=None, shapes={}, processes=1)
EVERY = recipe(
    checkpoints__every_steps=1,
    checkpoints__keep=100,
    validation={"every_steps": 5, "steps": 1, "objectives": [{"name": "multi_chunk", "data": "many"}]},
    memory__adapters={"rank": 2, "dropout": 0.1},
)


class Stopped(Exception):
    """As if the process had been killed."""


def stop_at(monkeypatch, place):
    """Let training end, without a word, when it begins a step (from 0) of an attempt."""
    original = Trainer._one_step

    def one_step(self, stage):
        if (self.number, self.state.step) == place:
            raise Stopped
        return original(self, stage)

    monkeypatch.setattr(Trainer, "_one_step", one_step)


def timeless(records):
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with a checkpoint after every step."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return train(EVERY, out=folder)


def only_until(folder, step, target):
    """A copy of a run as it was after ``step``."""
    shutil.copytree(folder, target)
    for path in (target / "checkpoints").iterdir():
        if int(path.name.partition("-")[2]) > step:
            shutil.rmtree(path)
    return target


@pytest.mark.parametrize("step", [2, 4, 7, 11])
def test_resumed_is_uninterrupted_bit_for_bit(whole, step, tmp_path):
    """Within a stage, at its end, between metrics; dropout, revisits, long-term memory and validation included."""
    folder = only_until(whole.folder, step, tmp_path / "run")
    again = train(EVERY, resume=folder)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name
    assert timeless(again.records) == timeless(whole.records)
    assert again.stages == whole.stages
    last = [read(run / "checkpoints/00-000000012/training.pt")["optimizer"] for run in (whole.folder, folder)]
    assert last[0].keys() == last[1].keys()
    for name, state in last[0].items():
        assert all(torch.equal(value, last[1][name][key]) for key, value in state.items())
    starts = json.loads((folder / "run.json").read_text())["starts"]
    assert [start["resumed_at"] for start in starts] == [None, step]


def test_a_process_that_dies_loses_what_came_after_its_last_checkpoint_only(whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, (0, 6))
        with pytest.raises(Stopped):
            train(EVERY, out=tmp_path / "run", settings={"checkpoints.every_steps": 4})
    assert [path.name for path in sorted((tmp_path / "run/checkpoints").iterdir())] == ["00-000000004"]
    # The recipe of the run itself; how often checkpoints are written may change.
    again = train(resume=tmp_path / "run", settings={"checkpoints.every_steps": 100})
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name
    assert timeless(again.records) == timeless(whole.records)


def test_a_restarted_run_resumes_in_its_last_attempt(tmp_path, monkeypatch):
    table = recipe(
        stages__0__until={"metric": "accuracy", "at_least": 1.0, "window": 2},
        stages__0__on_failure="restart",
        restarts=2,
        checkpoints__every_steps=1,
    )
    with monkeypatch.context() as patch:
        stop_at(patch, (1, 2))
        with pytest.raises(Stopped):
            train(table, out=tmp_path / "run")
    names = {path.name for path in (tmp_path / "run/checkpoints").iterdir()}
    assert names == {"01-000000001", "01-000000002"}  # those of the attempt before are gone
    with pytest.raises(TrainingError, match=r"must reach accuracy 1 .*restarts: 2"):
        train(resume=tmp_path / "run")
    note = json.loads((tmp_path / "run/run.json").read_text())
    assert len(note["seeds"]) == 3
    assert len(note["missed"]) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer.learning_rate": 1.0}, "is of another recipe: optimizer.learning_rate: 0.003 then, 1.0 now"),
        ({"seed": 4}, "is of another recipe: seed: 3 then, 4 now"),
        ({"data.many.questions": 4, "stages.0.steps": 9}, "data.many.questions: 3 then, 4 now; stages.0.steps: 4 then"),
        ({"memory.retriever.width": 4}, r"memory.retriever.width: 8 then, 4 now"),
    ],
)
def test_another_recipe_is_refused(whole, settings, message):
    with pytest.raises(CheckpointError, match=message):
        train(EVERY, resume=whole.folder, settings=settings)


def test_another_model_or_layout_is_refused(tmp_path):
    facts = RunIdentity(recipe={}, base="abc", shapes={"w": [2, 3]}, processes=2)
    saved = {"recipe": {}, "base": "abc", "shapes": {"w": [2, 3]}, "processes": 2}
    facts.check(saved, tmp_path)
    facts.check({**saved, "recipe": {"metrics": 1}}, tmp_path)
    for change, message in [
        ({"base": "abd"}, "is of another model: the decoder's own weights: digest abd then, abc now"),
        ({"shapes": {"w": [2, 4]}}, r"is of another model: w.1: 4 then, 3 now"),
        ({"shapes": {"v": [2]}}, r"is of another model: v: \[2\] then, None now; w: None then"),
        ({"processes": 1}, "must go on in as many processes as it was written by: 1 then, 2 now"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            facts.check({**saved, **change}, tmp_path)


def test_another_base_decoder_at_the_same_path_is_refused(whole, tmp_path):
    shutil.copytree(whole.folder / "model", tmp_path / "base")
    table = recipe(("model.build",), model__path=str(tmp_path / "base"))
    train(table, out=tmp_path / "run", steps=1)
    other = train(recipe(), steps=1, seed=9).model
    other.save_pretrained(tmp_path / "base", save_base=True)
    with pytest.raises(CheckpointError, match=r"is of another model: the decoder's own weights: digest"):
        train(table, resume=tmp_path / "run", steps=1)


def test_old_ones_go(tmp_path):
    store = CheckpointStore(tmp_path / "all", keep=2)
    for name in ("00-1", "00-2", "00-3", "01-1"):
        store.save(name, FACTS, {"step": 1}, {"x": torch.ones(2)}, {})
    assert [path.name for path in store.all()] == ["00-3", "01-1"]
    found = store.latest()
    assert found.folder.name == "01-1"
    assert torch.equal(found.shared["x"], torch.ones(2))
    assert found.manifest["recipe"] == {"a": 1}


@pytest.mark.parametrize("call", range(1, 9))
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch, call):
    """Whichever write, sync or rename it strikes."""
    store = CheckpointStore(tmp_path / "all", keep=1)
    store.save("00-1", FACTS, {"step": 1}, {"x": torch.ones(2)}, {"y": 1})
    calls = []

    def failing(original):
        def act(*args, **kwargs):
            calls.append(original)
            if len(calls) == call:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*args, **kwargs)

        return act

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "fsync", failing(os.fsync))
        patch.setattr(module.Path, "rename", failing(module.Path.rename))
        patch.setattr(module.Path, "mkdir", failing(module.Path.mkdir))
        with pytest.raises(CheckpointError, match=r"got No space left on device.*: make room or choose another"):
            store.save("00-2", FACTS, {"step": 2}, {"x": torch.zeros(2)}, {"y": 2})
    newest = store.latest()
    # The last sync comes after the rename: then the new one is complete as well, and stays.
    expected = ("00-1", 1.0) if call < 8 else ("00-2", 0.0)
    assert (newest.folder.name, float(newest.shared["x"][0])) == expected
    assert not list((tmp_path / "all").glob(".writing-*"))
    store.save("00-3", FACTS, {"step": 3}, {"x": torch.zeros(2)}, {"y": 3})
    assert [path.name for path in store.all()] == ["00-3"]


def test_a_full_disk_ends_training_and_training_goes_on_later(whole, tmp_path, monkeypatch):
    original, count = module.write, []

    def full(path, content):
        count.append(path)
        if len(count) > 9:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        original(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write", full)
        with pytest.raises(CheckpointError, match=r"No space left on device.*the newest complete checkpoint is .*00-0"):
            train(EVERY, out=tmp_path / "run")
    again = train(EVERY, resume=tmp_path / "run")
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name


def test_a_file_that_grows_too_large_is_an_error_of_the_system(tmp_path):
    """Not one of torch, which says something else where a file cannot be written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"File too large"):
            write(tmp_path / "big.pt", {"x": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    write(tmp_path / "big.pt", {"x": torch.zeros(1_000_000)})
    assert len(read(tmp_path / "big.pt")["x"]) == 1_000_000


def test_a_damaged_checkpoint_is_refused(whole, tmp_path):
    folder = only_until(whole.folder, 3, tmp_path / "run")
    newest = folder / "checkpoints/00-000000003"
    content = (newest / "training.pt").read_bytes()
    (newest / "training.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"training.pt must be a complete file of a checkpoint, got .*: remove"):
        train(EVERY, resume=folder)
    (newest / "training.pt").write_bytes(content)
    (newest / "checkpoint.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"checkpoint.json must be a complete file"):
        train(EVERY, resume=folder)
    (newest / "checkpoint.json").write_text('{"format": 99}')
    with pytest.raises(CheckpointError, match=r"must have format 2, got 99"):
        train(EVERY, resume=folder)
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(CheckpointError, match=r"must hold a checkpoint to go on from, it has none"):
        train(EVERY, resume=folder)
    with pytest.raises(CheckpointError, match=r"must be the folder of a run, with recipe.json"):
        train(EVERY, resume=tmp_path / "nowhere")


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    torch.save({"x": Evil()}, tmp_path / "evil.pt", pickle_module=pickle)
    with pytest.raises(CheckpointError, match=r"must be a complete file of a checkpoint"):
        read(tmp_path / "evil.pt")
    assert not (tmp_path / "pwned").exists()
