"""``mplus info``: the facts a bug report needs."""

from __future__ import annotations

import json
import platform
import re

import pytest
import torch
import transformers
from typer.testing import CliRunner

import mplus
from mplus.backends import BACKENDS
from mplus.backends.reference import ReferenceBackend
from mplus.cli import app
from mplus.hf.pretrained.shipped import RECALL_TINY


class RefusingBackend(ReferenceBackend):
    name = "refusing"

    def unsupported_reasons(self, request):
        return ["too early", f"only {request.queries.shape[2]} tokens"]


class FailingBackend(ReferenceBackend):
    name = "failing"

    def attend(self, request):
        raise RuntimeError("out of order")


def info(*options):
    result = CliRunner().invoke(app, ["info", *options], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    return result.stdout


def test_what_was_chosen_for_a_saved_decoder():
    shown = info(str(RECALL_TINY))
    for line in ("technique +attention", "short_term_tokens +32", "memory acts +memory moves the logits by"):
        assert re.search(line, shown), line
    assert "short_term_tokens: 32" in json.loads(info(str(RECALL_TINY), "--json"))["model"]


@pytest.fixture
def broken_backends():
    BACKENDS.register("refusing", RefusingBackend)
    BACKENDS.register("failing", FailingBackend)
    yield
    BACKENDS.unregister("refusing")
    BACKENDS.unregister("failing")


def test_facts():
    facts = json.loads(info("--json"))
    versions = facts["versions"]
    assert versions["python"] == platform.python_version()
    assert versions["mplus"] == mplus.__version__
    assert versions["torch"] == torch.__version__
    assert versions["transformers"] == transformers.__version__
    names = [device["name"] for device in facts["devices"]]
    assert names[0] == "cpu"
    assert len(names) == 1 + torch.accelerator.device_count()
    assert {"ram"} <= set(facts["implementations"]["store"])
    assert {"linear", "random"} <= set(facts["implementations"]["retriever"])
    on_cpu = {entry["backend"]: entry for entry in facts["backends"] if entry["device"] == "cpu"}
    assert on_cpu["reference"]["usable"]
    assert on_cpu["sdpa"]["usable"]
    assert on_cpu["sdpa"]["reason"] is None


@pytest.mark.usefixtures("broken_backends")
def test_a_backend_that_cannot_run_says_why():
    entries = {entry["backend"]: entry for entry in json.loads(info("--json"))["backends"] if entry["device"] == "cpu"}
    assert not entries["refusing"]["usable"]
    assert entries["refusing"]["reason"] == "too early; only 16 tokens"
    assert not entries["failing"]["usable"]
    assert entries["failing"]["reason"] == "RuntimeError: out of order"
    text = info()
    assert "cannot run: RuntimeError: out of order" in text


def test_text():
    lines = [line.split() for line in info().splitlines()]
    assert ["torch", torch.__version__] in lines
    assert ["backend", "reference", "cpu,", "float32:", "runs"] in lines
    assert any(line[:1] == ["store"] and "ram," in line for line in lines)
