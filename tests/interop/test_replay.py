"""The golden traces, replayed as they are and with one thing done differently."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from attrs import evolve
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from mplus.backends import BACKENDS
from mplus.cli import app
from mplus.errors import CheckpointError, UnknownNameError
from mplus.hf.model.engine import DecoderEngine
from mplus.interop import PublishedCheckpoint, replay
from mplus.interop.golden import REPLAYS, STEPS, TracePlayer
from mplus.interop.published_config import PublishedConfig
from mplus.interop.published_player import EQUAL, MEASURED
from mplus.interop.report import TOLERANCE, CaseReport
from mplus.interop.trace import TENSORS, WEIGHTS, Trace
from mplus.mechanisms.memoryllm import MemoryLLMMechanism
from mplus.mechanisms.mplus import MPlusMechanism
from mplus.memory.writing.update import Update

pytestmark = pytest.mark.two_computations

GOLDENS = Path(__file__).parents[1] / "goldens"
CASES = sorted(path.parent.name for path in GOLDENS.glob(f"*/{STEPS}"))


def one(name, backend="sdpa", **options):
    (report,) = replay(GOLDENS / name, backend, **options)
    return report


def test_all_four_cases_are_here():
    assert CASES == ["memoryllm_a", "memoryllm_b", "mplus_a", "mplus_b"]


BY_NAME = ("reference", "sdpa", "merge", "flex")
"""Backends that the traces are replayed through on a CPU; tests/interpreted replays them through triton."""
LARGE = ("memoryllm_a", "mplus_a")
SMALL = ["memoryllm_b", "mplus_b"]
WAYS = [(backend, name, torch.float32, False) for backend in BY_NAME for name in CASES]
WAYS += [("merge", name, torch.float32, True) for name in CASES]
WAYS += [("merge", name, torch.float64, False) for name in CASES]


def at_night(backend, name, dtype, reset):
    """The large cases where they take long or differ in one more thing, and what compiles for long."""
    if backend == "flex":
        return name != "memoryllm_b"
    return name in LARGE and (backend == "reference" or reset or dtype == torch.float64)


@pytest.mark.parametrize(
    ("backend", "name", "dtype", "reset"),
    [pytest.param(*way, marks=[pytest.mark.nightly] if at_night(*way) else []) for way in WAYS],
    ids=lambda value: {True: "every step from the recorded state", False: ""}.get(value, str(value)),
)
def test_replays(backend, name, dtype, reset, monkeypatch):
    attended = counted(BACKENDS.get(backend), monkeypatch)
    report = one(name, backend, dtype=dtype, reset=reset)
    assert report.passed(2e-5), report
    steps = json.loads((GOLDENS / name / STEPS).read_text())["steps"]
    assert report.steps == len(steps)
    assert len(attended) > len(steps), "every step attends, by this backend"
    with_ltm = name.startswith("mplus")
    assert set(report.errors) == set(MEASURED) - (set() if with_ltm else {"LTM", "ages", "keys", "scores"})
    assert set(report.equal) == set(EQUAL) - (set() if with_ltm else {"retrieved ids", "recall frequencies"})
    assert report.errors.get("ages", 0.0) == 0.0


def counted(backend, monkeypatch):
    """A list that grows with every request that ``backend`` attends to."""
    requests, attend = [], backend.attend
    monkeypatch.setattr(backend, "attend", lambda self, request: requests.append(None) or attend(self, request))
    return requests


def test_every_backend_is_named():
    assert {*BY_NAME, "triton"} == {name for name in BACKENDS.names() if BACKENDS.origin(name).startswith("mplus ")}


@pytest.fixture(scope="module")
def small_cases(tmp_path_factory):
    """A folder of two cases."""
    folder = tmp_path_factory.mktemp("cases")
    for name in SMALL:
        shutil.copytree(GOLDENS / name, folder / name)
    return folder


def test_a_folder_of_cases_is_replayed_by_name(small_cases):
    seen = []
    reports = replay(small_cases, progress=lambda case, step, steps: seen.append((case, step, steps)))
    assert [report.name for report in reports] == SMALL
    assert [entry for entry in seen if entry[1] == 1] == [(report.name, 1, report.steps) for report in reports]
    assert len(seen) == sum(report.steps for report in reports)


# ---------------------------------------------------------------- one thing done differently


def without_mark(monkeypatch):
    change_loaded(monkeypatch, lambda model, memory: model.mplus.mark.data.zero_())


def without_begin_rows(monkeypatch):
    change_loaded(monkeypatch, lambda model, memory: model.mplus.begin.data.zero_())


def other_adapter(monkeypatch):
    swapped = {"write": "read", "read": "write"}
    own = DecoderEngine.adapter
    monkeypatch.setattr(DecoderEngine, "adapter", lambda self, wanted: own(self, swapped[wanted]))


def rounded_frequencies(monkeypatch):
    load = PublishedCheckpoint.load
    change = {"rope_inv_freq_dtype": "bfloat16"}
    monkeypatch.setattr(PublishedCheckpoint, "load", lambda self, **options: load(self, **{**options, **change}))


def recomputed_keys(monkeypatch):
    def recompute(model, memory):
        store = memory.stores[0]
        for layer in range(store.layout.layers):
            rows = store.gather(layer, store.ids(layer))
            store.remove(layer, store.ids(layer))
            store.append(layer, rows.replace(key=model.mplus_engine.keys(layer, rows.hidden).detach()))

    change_loaded(monkeypatch, recompute)


def lower_id_first(monkeypatch):
    """The other order among rows of equal age."""
    own = MPlusMechanism.bring_back

    def in_order(self, store, layer, ids, scores):
        return own(self, store, layer, ids.flip(0), scores.flip(0))

    monkeypatch.setattr(MPlusMechanism, "bring_back", in_order)


def ages_as_floats(monkeypatch):
    """Births kept as narrow floats, which cannot tell neighbours apart."""
    own = MPlusMechanism.keep_dropped

    def keep_dropped(self, state, dropped, context):
        state, evicted = own(self, state, dropped, context)
        coarse = [rows.replace(birth=rows.birth.to(torch.float8_e4m3fn).to(torch.int64)) for rows in state.pending]
        return evolve(state, pending=tuple(coarse)), evicted

    monkeypatch.setattr(MPlusMechanism, "keep_dropped", keep_dropped)


def unsorted_drop(monkeypatch):
    """Rows that stay in the order in which they were drawn."""
    own = torch.Tensor.sort

    def sort(self, *args, **kwargs):
        drawn = self.dtype == torch.int64 and self.dim() == 1 and args in ((), (-1,)) and kwargs in ({}, {"dim": -1})
        return type("Sorted", (), {"values": self}) if drawn else own(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "sort", sort)


def options(**changed):
    def change(monkeypatch):
        own = MPlusMechanism.Options.defaults.__func__
        defaults = classmethod(lambda cls, variant: {**own(cls, variant), **changed})
        monkeypatch.setattr(MPlusMechanism.Options, "defaults", defaults)

    change.__name__ = str(changed)
    return change


def settings(**changed):
    def change(monkeypatch):
        own = PublishedConfig.from_file
        monkeypatch.setattr(PublishedConfig, "from_file", lambda path: evolve(own(path), **changed))

    change.__name__ = str(changed)
    return change


def filled_with_first_rows(monkeypatch):
    """The pool of an empty MemoryLLM filled up with the first rows of the block, not with its last."""
    absorb, tiled = MemoryLLMMechanism.absorb, []

    def wrong(self, state, update, source, context):
        if len(state.stm[0]):
            return absorb(self, state, update, source, context)
        tiled.append(len(update.hidden[0]))
        n = self.config.short_term_tokens
        full = tuple(hidden.repeat(-(-n // len(hidden)), 1)[:n] for hidden in update.hidden)
        return absorb(self, state, Update(full), source, context)

    monkeypatch.setattr(MemoryLLMMechanism, "absorb", wrong)


def change_loaded(monkeypatch, change):
    load = PublishedCheckpoint.load

    def changed(self, **options):
        model, memory = load(self, **options)
        change(model, memory)
        return model, memory

    monkeypatch.setattr(PublishedCheckpoint, "load", changed)


@pytest.mark.parametrize(
    ("name", "change", "shows_in"),
    [
        ("mplus_b", without_mark, "new tokens"),
        ("memoryllm_b", without_mark, "new tokens"),
        ("mplus_b", without_begin_rows, "logits"),
        ("mplus_b", other_adapter, "hidden states"),
        ("mplus_b", rounded_frequencies, "logits"),
        ("mplus_b", recomputed_keys, "keys"),
        ("mplus_b", lower_id_first, "retrieved ids"),
        ("mplus_a", lower_id_first, "retrieved ids"),
        ("mplus_a", ages_as_floats, "ages"),
        ("mplus_b", unsorted_drop, "memory"),
        ("mplus_b", options(ages="birth"), "ages"),
        ("mplus_b", options(short_ltm="all"), "retrieved ids"),
        ("mplus_a", settings(merge_every=4), "counters"),
        ("mplus_a", settings(decay=0.5), "recall frequencies"),
        ("mplus_a", settings(lifetime=9.0), "recall frequencies"),
        ("memoryllm_b", settings(drop_per_layer=True), None),
        ("memoryllm_a", settings(drop_per_layer=False), "permutations"),
        ("memoryllm_b", filled_with_first_rows, "memory"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_deviation_fails(name, change, shows_in, monkeypatch):
    change(monkeypatch)
    if shows_in is None:  # it asks for more permutations than were drawn
        with pytest.raises(CheckpointError, match="randperm must hold a permutation"):
            one(name)
        return
    report = CaseReport(name, "model", "sdpa", "float32")
    for _ in REPLAYS.get(name.partition("_")[0])(GOLDENS / name, "sdpa", torch.float32).play(report):
        report.steps += 1
        if report.errors.get(shows_in, 0.0) > TOLERANCE or report.equal.get(shows_in) is False:
            break  # the rest of the case could only deviate further
    else:
        pytest.fail(f"nothing shows in {shows_in}: {report}")
    assert not report.passed()
    assert report.differences[shows_in].startswith(("step ", "initial state"))


# ---------------------------------------------------------------- the report


def test_report_sees_shapes_nan_and_places():
    report = CaseReport("case", "mplus", "sdpa", "float32", steps=1)
    report.measure("logits", "here", torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.00001]))
    assert report.passed()
    report.measure("logits", "there", torch.tensor([1.0, float("nan")]), torch.zeros(2))
    assert report.errors == {"logits": float("inf")}
    report = CaseReport("case", "mplus", "sdpa", "float32", steps=1)
    report.measure("memory", "there", torch.zeros(2, 3), torch.zeros(2, 4))
    assert (report.worst, report.differences) == (float("inf"), {"memory": "there, shape [2, 3] for [2, 4]"})
    report = CaseReport("case", "mplus", "sdpa", "float32", steps=1)
    report.demand("retrieved ids", "first", torch.tensor([1, 2]), torch.tensor([1, 2]))
    assert report.passed()
    report.demand("retrieved ids", "second", torch.tensor([1, 2]), torch.tensor([2, 1]))
    report.demand("retrieved ids", "third", torch.tensor([1]), torch.tensor([1, 1]))
    assert not report.passed()
    assert report.differences == {"retrieved ids": "second"}
    assert not CaseReport("case", "mplus", "sdpa", "float32").passed(), "nothing was replayed"


# ---------------------------------------------------------------- damaged traces


@pytest.fixture
def case(tmp_path):
    return Path(shutil.copytree(GOLDENS / "memoryllm_b", tmp_path / "case"))


def edit_steps(case, change):
    plain = json.loads((case / STEPS).read_text())
    change(plain)
    (case / STEPS).write_text(json.dumps(plain))


def edit_tensors(case, change, file=TENSORS):
    tensors = {name: tensor.clone() for name, tensor in load_file(case / file).items()}
    change(tensors)
    save_file(tensors, case / file)


@pytest.mark.parametrize(
    ("tensor", "quantity", "kind"),
    [
        ("s000.logits", "logits", "forward"),
        ("s020.logits_2", "logits", "decode"),
        ("s011.hidden_states", "hidden states", "forward"),
        ("s002.memory", "memory", "inject"),
        ("s009.delta_memory", "new tokens", "inject"),
        ("s021.sequences", "generated tokens", "generate"),
    ],
)
def test_a_changed_number_in_a_trace_is_found(tensor, quantity, kind, case):
    def change(tensors):
        flat = tensors[tensor].view(-1)
        flat[-1] += 1 if "sequences" in tensor else 1e-4

    edit_tensors(case, change)
    (report,) = replay(case)
    assert not report.passed()
    assert set(report.differences) >= {quantity}
    assert f"({kind})" in report.differences[quantity]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plain: plain.update(format=2), "format in .* must be 1, got 2"),
        (lambda plain: plain.update(model=None), "model in .* must be the name of a model, got None"),
        (
            lambda plain: plain.update(model="rwkv"),
            r"model in .* must be one of 'memo', 'memoryllm', 'mplus', got 'rwkv': install .* 'mplus\.replays'",
        ),
        (lambda plain: plain["steps"][3].update(kind="forget"), "kind of step 3 .* got 'forget'"),
        (lambda plain: plain["steps"][3].pop("state_after"), "must have 'state_after'"),
        (lambda plain: plain["steps"][0]["outputs"].clear(), r"step 0 \(forward\) must have an output 'logits'"),
        (lambda plain: plain["steps"][0]["inputs"].clear(), r"step 0 \(forward\) must have an input 'input_ids'"),
        (lambda plain: plain["steps"][4].update(randperm=None), "randperm must hold a permutation of 20 rows"),
        (lambda plain: plain["steps"][0]["outputs"].update(logits="nothing"), "must have a tensor 'nothing'"),
        (lambda plain: plain["steps"][0]["outputs"].update(logits=None), "must name a tensor where it has null"),
        (lambda plain: plain["steps"][5].update(kind="merge"), "a merge step needs a memory with long-term rows"),
    ],
)
def test_damaged_steps(change, message, case):
    edit_steps(case, change)
    with pytest.raises(CheckpointError, match=message):
        replay(case)


def test_damaged_files(case):
    edit_tensors(case, lambda tensors: tensors.pop("memory"), WEIGHTS)
    with pytest.raises(CheckpointError, match="must have memory of shape"):
        replay(case)
    (case / TENSORS).write_bytes((case / TENSORS).read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"trace.safetensors must be a complete safetensors file"):
        replay(case)
    (case / STEPS).write_text("[]")
    with pytest.raises(CheckpointError, match=r"steps.json must be a JSON object"):
        replay(case)
    (case / STEPS).unlink()
    with pytest.raises(CheckpointError, match="must hold golden traces"):
        replay(case)


def test_refusals(case):
    with pytest.raises(UnknownNameError, match="'nonesuch'"):
        replay(case, "nonesuch")
    with pytest.raises(CheckpointError, match=r"float32 or torch.float64, got torch.bfloat16"):
        replay(case, dtype=torch.bfloat16)
    shutil.copyfile(GOLDENS / "mplus_b" / "config.json", case / "config.json")
    shutil.copyfile(GOLDENS / "mplus_b" / WEIGHTS, case / WEIGHTS)
    with pytest.raises(CheckpointError, match="must be of the model 'memoryllm', got 'mplus'"):
        replay(case)


# ---------------------------------------------------------------- players of other models


class CountingPlayer(TracePlayer):
    """Plays the numbers that a case has in ``values``; the last one is played wrong."""

    quantities = ("value", "place", "colour")

    def __init__(self, folder, backend, dtype):
        super().__init__(folder, backend, dtype)
        self.values = json.loads((folder / STEPS).read_text())["values"]

    def __len__(self):
        return len(self.values)

    def play(self, report, *, reset=False):
        for place, value in enumerate(self.values):
            ours = value if reset or place + 1 < len(self) else value + 1
            report.measure("value", f"step {place}", torch.tensor([float(ours)]), torch.tensor([float(value)]))
            report.demand("place", f"step {place}", place, place)
            yield


@pytest.fixture
def counted_case(tmp_path):
    (tmp_path / "numbers").mkdir()
    (tmp_path / "numbers" / STEPS).write_text(json.dumps({"model": "counting", "values": [3, 1, 4]}))
    return tmp_path / "numbers"


def test_a_case_is_played_by_the_player_of_its_model(counted_case):
    REPLAYS.register("counting", CountingPlayer)
    try:
        right = CliRunner().invoke(app, ["replay", str(counted_case), "--reset"])
        assert right.exit_code == 0, right.output
        assert "numbers: passed, 3 steps replayed (auto, float32)" in right.output
        wrong = CliRunner().invoke(app, ["replay", str(counted_case)])
    finally:
        REPLAYS.unregister("counting")
    assert wrong.exit_code == 1
    rows = [line.split() for line in wrong.output.splitlines()]
    assert ["value", "max", "abs", "error", "1.0e+00", "step", "2"] in rows
    assert ["place", "equal"] in rows
    assert ["colour", "none", "in", "this", "case"] in rows


def test_a_case_of_a_model_that_nothing_plays_says_what_is_missing(counted_case):
    refused = CliRunner().invoke(app, ["replay", str(counted_case)])
    assert refused.exit_code == 2
    message = " ".join(refused.stderr.split())
    assert "got 'counting': install the package that announces a trace player of this name" in message
    assert "entry-point group 'mplus.replays'" in message


# ---------------------------------------------------------------- the public surface


@pytest.mark.parametrize("name", CASES)
def test_memory_and_model_do_what_was_recorded(name, monkeypatch):
    """Write and read by ``Memory`` and the model themselves, as far as the traces go that way."""
    checkpoint = PublishedCheckpoint.open(GOLDENS / name, WEIGHTS)
    model, memory = checkpoint.load(rope_inv_freq_dtype=None, config={"min_chunk_tokens": 1})
    trace, compared = Trace(GOLDENS / name), 0
    for step in trace:
        if step.kind == "merge" or (
            step.kind == "inject" and "delta_memory" in step.inputs and step.args["update_memory"]
        ):
            break
        if step.kind == "inject" and step.args["update_memory"]:
            drawn = iter([] if step.randperm is None else step.randperm.long())
            monkeypatch.setattr(torch, "randperm", lambda n, generator, drawn=drawn: next(drawn))
            memory.write_chunk(step.inputs["input_ids"].long())
            stm = torch.stack([rows.hidden for rows in memory.states[0].stm])
            assert torch.allclose(stm, step.after.memory, atol=TOLERANCE, rtol=0)
            compared += 1
        elif step.kind == "forward" and "delta_memory" not in step.inputs:
            with torch.no_grad():
                logits = model(step.inputs["input_ids"].long(), memory=memory).logits
            assert torch.allclose(logits, step.outputs["logits"], atol=TOLERANCE, rtol=0)
            compared += 1
    assert compared >= 2


# ---------------------------------------------------------------- the command


def test_command_passes_and_says_what_it_compared(small_cases):
    result = CliRunner().invoke(app, ["replay", str(small_cases), "--backend", "sdpa"])
    assert result.exit_code == 0, result.output
    assert "2 of 2 cases passed\n" in result.output
    assert "mplus_b: passed, 80 steps replayed (sdpa, float32); largest error " in result.output
    assert result.output.count("e-06, allowed 2e-05\n") == len(SMALL), "every case says its bound"
    for quantity in (*MEASURED, *EQUAL):
        assert result.output.count(quantity) >= len(SMALL)


def test_command_fails_and_says_where(case):
    edit_tensors(case, lambda tensors: tensors["s000.logits"].add_(1e-3))
    result = CliRunner().invoke(app, ["replay", str(case), "--dtype", "float64", "--reset"])
    assert result.exit_code == 1
    assert "case: FAILED, 24 steps replayed (auto, float64)" in result.output
    assert "step 0 (forward)" in result.output
    assert "0 of 1 cases passed" in result.output


def test_command_refuses_a_folder_without_traces(tmp_path):
    result = CliRunner().invoke(app, ["replay", str(tmp_path)])
    assert result.exit_code == 2
    assert "must hold golden traces" in result.stderr
