"""Two processes with two streams each train what one process with four streams trains, with activations swapped."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import mplus
from mplus.testing.rounding import check_close
from mplus.training import train
from tests.training.parallel_worker import STEPS, exact_gradients, table, watched

pytestmark = [pytest.mark.two_computations, pytest.mark.nightly]

ROOT = Path(__file__).parents[2]
KINDS = ("ddp", "fsdp2")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process with all streams."""
    return watched(tmp_path_factory.mktemp("runs") / "alone", 4, None)


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """The first gradient of one process with all streams, in float64."""
    return exact_gradients(tmp_path_factory.mktemp("runs") / "exact", 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes wrote, in each of the ways."""
    folder = tmp_path_factory.mktemp("runs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.training.parallel_worker", *KINDS, str(folder)]
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=240)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # those it has forked, too
    assert process.returncode == 0, output
    return folder


@pytest.fixture(params=KINDS)
def together(request, folder):
    """What came of one of them, and its run."""
    return torch.load(folder / f"{request.param}.pt", weights_only=True), folder / request.param


def test_the_first_gradient_is_that_of_one_process(alone, exact, together):
    found, expected = together[0]["gradients"], alone["gradients"]
    assert found.keys() == expected.keys() == exact.keys()
    for name, gradient in expected.items():
        check_close(found[name], gradient, exact[name], name=name)


def test_the_losses_stay_those_of_one_process(alone, together):
    """Across a resume in the middle, too."""
    assert len(alone["losses"]) == STEPS
    assert together[0]["losses"] == pytest.approx(alone["losses"], rel=0, abs=1e-4)
    assert together[0]["validation"] == pytest.approx(alone["validation"], rel=0, abs=1e-4)


def test_the_model_is_one_whole(alone, together):
    found, run = together
    loaded = mplus.from_pretrained(run / "model", check=False).state_dict()
    assert loaded.keys() == alone["weights"].keys() == found["weights"].keys()
    for name, tensor in alone["weights"].items():
        assert torch.equal(loaded[name], found["weights"][name])
        torch.testing.assert_close(loaded[name], tensor, rtol=1e-2, atol=1e-3, msg=name)


def test_a_run_of_two_processes_is_not_resumed_by_one(together):
    with pytest.raises(mplus.errors.CheckpointError, match=r"is of another recipe: streams: 2 then, 4 now"):
        train(table(4, swapped=True), resume=together[1])
    with pytest.raises(mplus.errors.CheckpointError, match=r"must go on in as many processes .*: 2 then, 1 now"):
        train(table(2, swapped=True), resume=together[1])


def test_each_process_wrote_memories_of_its_own(together):
    newest = max((together[1] / "checkpoints").iterdir(), key=lambda path: path.name)
    assert {path.name for path in newest.iterdir()} == {
        "checkpoint.json",
        "training.pt",
        "process-0.pt",
        "process-1.pt",
    }
    assert json.loads((newest / "checkpoint.json").read_text())["processes"] == 2
    note = json.loads((together[1] / "run.json").read_text())
    assert [start["processes"] for start in note["starts"]] == [2, 2]
