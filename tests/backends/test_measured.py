"""The orders of backends that were measured on GPUs, and what "auto" makes of them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import attrs
import pytest
import torch

from mplus.backends import measured
from mplus.backends.choose import BackendChooser, choose
from mplus.backends.triton.gather import reasons_against_gathering
from mplus.backends.triton.score import reasons_against_scoring
from mplus.testing.drawing import RequestShape

GPU = torch.device("cuda", 0)
ENTRY = {"step": ["triton", "sdpa"], "prompt": ["sdpa"], "gradient": ["reference"], "refused": {"score": "off by 1"}}


@pytest.fixture(autouse=True)
def hopper(tmp_path, monkeypatch):
    """A GPU of which one can only ask what it is, and a table with an entry for it."""
    file = tmp_path / "measured.json"
    file.write_text(json.dumps({"9.0": ENTRY}))
    monkeypatch.setattr(measured, "FILE", file)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    for cached in (measured.entries, measured.entry_of):
        cached.cache_clear()
    yield
    for cached in (measured.entries, measured.entry_of):
        cached.cache_clear()


def elsewhere(request, device=GPU):
    """A request whose tensors say that they are on a device, without one."""
    queries = SimpleNamespace(device=device, shape=request.queries.shape, requires_grad=request.queries.requires_grad)
    return SimpleNamespace(queries=queries, keys=request.keys, values=request.values, segments=request.segments)


def test_an_order_is_that_of_the_kind_of_request():
    one, many = RequestShape(queries=1).build(), RequestShape(queries=3).build()
    learning = attrs.evolve(one, keys=one.keys.clone().requires_grad_())
    assert measured.measured_order(elsewhere(one)) == ("triton", "sdpa")
    assert measured.measured_order(elsewhere(many)) == ("sdpa",)
    assert measured.measured_order(elsewhere(learning)) == ("reference",)
    with torch.no_grad():
        assert measured.kind_of(learning) == "step"


def test_there_is_none_elsewhere(monkeypatch):
    assert measured.measured_order(RequestShape().build()) == ()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    assert measured.measured_order(elsewhere(RequestShape().build())) == ()


def test_the_shipped_table_names_backends_that_there_are(monkeypatch):
    monkeypatch.undo()
    from mplus.backends import BACKENDS

    for entry in measured.entries().values():
        assert {name for kind in measured.KINDS for name in entry[kind]} <= set(BACKENDS.names())


def test_auto_asks_those_that_were_measured_first(monkeypatch, caplog):
    monkeypatch.setattr("mplus.backends.choose.measured_order", lambda request: ("triton", "reference"))
    request = RequestShape().build()
    with caplog.at_level("INFO", "mplus.backends.choose"):
        assert choose("auto", request).name == "reference"  # triton refuses a CPU
    assert "triton: device cpu" in caplog.text
    assert choose("sdpa", request).name == "sdpa"
    monkeypatch.setattr("mplus.backends.choose.measured_order", lambda request: ("triton",))
    assert BackendChooser().choose(request).name == "merge", "the others are asked behind them"


def test_a_kernel_that_was_wrong_is_not_used_on_such_a_gpu(monkeypatch):
    for module in ("score", "gather"):
        monkeypatch.setattr(f"mplus.backends.triton.{module}.reasons_against", lambda device, interpret: [])
    part = SimpleNamespace(device=GPU, dtype=torch.float32, shape=(2, 3))
    (reason,) = reasons_against_scoring(part, part)
    assert "off by 1" in reason
    assert reasons_against_gathering(part, part, part, 8) == []
