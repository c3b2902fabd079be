"""The run on a GPU as a whole, with parts that do nothing: what fails or hangs is told, and the others run."""

from __future__ import annotations

import json
import sys
import time

import pytest
import torch

from benchmarks.gpu import packages
from benchmarks.gpu.choice import chosen_order
from benchmarks.gpu.plan import PARTS, Part, parts_of
from benchmarks.gpu.runner import AT_A_TIME, FOR_GATES, Runner, command_of, read_lines
from benchmarks.gpu.session import DeviceLostError, Session
from benchmarks.gpu.summary import summary
from benchmarks.gpu.taking import put_into_tree

SAYS = "import json, sys; open(sys.argv[1], 'a').write(json.dumps({0}) + chr(10))"
ENDS = {
    "well": SAYS.format({"kind": "part", "part": "well", "status": "ok", "reason": None}),
    "badly": "print('a traceback');"
    + SAYS.format({"kind": "part", "part": "badly", "status": "failed", "reason": "2 gates failed"}),
    "at once": "import sys; print('out of memory'); sys.exit(3)",
    "never": "import time; print('begun', flush=True); time.sleep(60)",
    "last": SAYS.format({"kind": "part", "part": "last", "status": "ok", "reason": None}),
}


def runner(folder, seconds=30.0, said=None):
    def command(part, results, options):
        return [sys.executable, "-S", "-c", ENDS[part.name], str(results)]

    said = [] if said is None else said
    return Runner(folder / "results.jsonl", folder, seconds, command=command, say=said.append)


def endings(folder):
    return {line["part"]: line for line in read_lines(folder / "results.jsonl") if line["kind"] == "part"}


def test_what_fails_or_hangs_does_not_hide_the_rest(tmp_path):
    said = []
    parts = [Part(name, "", 1.0 if name == "never" else 20.0, timed=name == "last") for name in ENDS]
    assert not runner(tmp_path, said=said).run(parts)
    found = endings(tmp_path)
    assert {name: line["status"] for name, line in found.items()} == {
        "well": "ok",
        "badly": "failed",
        "at once": "failed",
        "never": "failed",
        "last": "ok",
    }
    assert "status 3" in found["at once"]["reason"]
    assert found["at once"]["output"] == "out of memory"
    assert "its limit of 1 seconds" in found["never"]["reason"]
    assert found["never"]["output"] == "begun"
    assert len(said) == len(ENDS)
    logged = [line for line in read_lines(tmp_path / "results.jsonl") if line["kind"] == "log"]
    assert [(line["part"], line["output"]) for line in logged] == [("badly", "a traceback")]


def test_a_run_ends_in_time(tmp_path):
    begun = time.monotonic()
    assert not runner(tmp_path, 2.0).run([Part("well", "", 1.0), Part("never", "", 60.0), Part("last", "", 60.0)])
    assert time.monotonic() - begun < 20
    assert all(
        "not run: too little was left of 2 seconds" in endings(tmp_path)[name]["reason"] for name in ("never", "last")
    )


def test_an_interrupt_leaves_nothing_running(tmp_path):
    def interrupt(line):
        if line.startswith("at once"):
            raise KeyboardInterrupt

    run = runner(tmp_path)
    run.say, begun = interrupt, time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run.run([Part("well", "", 20.0), *(Part(name, "", 60.0) for name in ("at once", "never"))])
    assert time.monotonic() - begun < 20
    assert any(words in endings(tmp_path)["never"]["reason"] for words in ("status -9", "not run"))


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    (tmp_path / "results.jsonl").write_text('{"kind": "gate"}\n{"kind": "ga')
    assert read_lines(tmp_path / "results.jsonl") == [{"kind": "gate"}]


def test_every_part_has_a_function():
    for part in PARTS:
        module, _, function = part.target.partition(":")
        file = packages.ROOT.joinpath("benchmarks", "gpu", *module.split(".")).with_suffix(".py")
        assert f"def {function}(session: Session)" in file.read_text(encoding="utf-8"), part.name
    assert [part.name for part in parts_of(["score-kernel", "device"], rehearsal=True)] == ["device", "score-kernel"]
    assert not any(part.on_cpu for part in parts_of(None, rehearsal=False))
    with pytest.raises(ValueError, match="got scores"):
        parts_of(["scores"], rehearsal=True)
    assert command_of(PARTS[0], packages.ROOT, ["--tiny"])[-1] == "--tiny"


def test_all_parts_have_time_enough_together():
    """Also where every gate takes as long as it may."""
    gates = [part.seconds for part in PARTS if not part.timed and not part.on_cpu]
    assert sum(gates) / AT_A_TIME < FOR_GATES * 9 * 60
    assert sum(part.seconds for part in PARTS if part.timed) < 9 * 60


class TestGates:
    @pytest.fixture
    def session(self, tmp_path):
        return Session("some", tmp_path / "results.jsonl", torch.device("cpu"), tiny=True, few=True)

    def outcomes(self, session):
        return {line["gate"]: (line["status"], line["reason"]) for line in read_lines(session.file)}

    def test_one_that_fails_says_why_and_the_next_runs(self, session):
        exact = torch.ones(3, dtype=torch.float64)
        with session.gate("right") as gate:
            gate.close(exact.float(), exact.float(), exact)
        with session.gate("wrong") as gate:
            gate.close(exact.float() + 1e-3, exact.float(), exact)
        with session.gate("NaN") as gate:
            gate.close(exact.float() * torch.nan, exact.float(), exact)
        with session.gate("other bits") as gate:
            gate.same(torch.zeros(2), torch.tensor([0.0, -0.0]))
        with session.gate("raises"):
            raise RuntimeError("no kernel image")
        found = self.outcomes(session)
        assert found["right"] == ("ok", None)
        assert found["wrong"][0] == found["NaN"][0] == found["other bits"][0] == "failed"
        assert "differs from float64 by 0.001" in found["wrong"][1]
        assert found["raises"] == ("failed", "RuntimeError: no kernel image")
        assert session.failed == ["wrong", "NaN", "other bits", "raises"]

    def test_nothing_more_is_tried_on_a_gpu_that_is_lost(self, session, monkeypatch):
        def lost(session):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        monkeypatch.setattr(Session, "synchronise", lost)
        with pytest.raises(DeviceLostError, match="illegal memory access"), session.gate("kernel"):
            pass

    @pytest.mark.parametrize("name", ["stores", "tiered", "retrievers", "attention-torch"])
    def test_the_gates_open_on_a_cpu(self, session, name):
        from benchmarks.gpu.part import run_part

        session.part = name
        run_part(session)
        found = self.outcomes(session)
        assert found
        assert {status for status, _ in found.values()} == {"ok"}

    def test_a_backend_that_is_wrong_does_not_pass(self, session, monkeypatch):
        from benchmarks.gpu.gates import attention
        from mplus.backends.base import AttentionResult
        from mplus.backends.sdpa import SdpaBackend

        right = SdpaBackend.attend
        monkeypatch.setattr(
            SdpaBackend, "attend", lambda self, request: AttentionResult(right(self, request).output * 1.5)
        )
        attention.check(session, SdpaBackend())
        assert {status for status, _ in self.outcomes(session).values()} == {"failed"}


def attention_record(**times):
    """One case of a token behind a prompt and one of a prompt."""

    def arms(place):
        return {f"backend/{name}": {"status": "ok", "p50_ms": taken[place]} for name, taken in times.items()}

    cases = [{"queries": 1, "arms": arms(0), "ratios": {}}, {"queries": 512, "arms": arms(1), "ratios": {}}]
    return {"kind": "attention", "by_threads": {"1": {"cases": cases}}, "circumstances": {"commit": None}}


def lines(*, rehearsal=False, failed=()):
    device = {"kind": "device", "part": "device", "rehearsal": rehearsal, "device": "NVIDIA X", "capability": "9.0"}
    found = [{**device, "commit": "abc", "modified": False, "total_bytes": 2**37, "date": "2026-01-01", "torch": "2"}]
    for gate in ("triton/memory", "triton/gradient/memory", "sdpa/memory", "reference/memory", "score/one"):
        part = "attention-triton-float32" if "triton" in gate else "attention-torch"
        status = "failed" if gate in failed else "ok"
        found.append({"kind": "gate", "part": part, "gate": gate, "status": status, "reason": "off by 1"})
    ended = [part.name for part in PARTS if part.name.startswith(("attention-triton", "attention-torch"))]
    found += [{"kind": "part", "part": part, "status": "ok", "reason": None} for part in ended]
    times = {"triton": (0.1, 2.0), "sdpa": (0.4, 1.0), "reference": (0.5, 9.0)}
    found.append({"kind": "record", "name": "attention-p", "ratios": {}, "record": attention_record(**times)})
    steps = [{"case": [512, 1, 512], "ms": {"triton": 1.0, "sdpa": 2.0}, "ratios": {}}]
    found.append({"kind": "record", "name": "gradient-p", "ratios": {}, "record": {"kind": "gradient", "cases": steps}})
    return found


def test_auto_takes_the_fastest_that_passed():
    order = chosen_order(lines())
    assert order["step"] == ["triton", "sdpa", "reference"]
    assert order["prompt"] == ["sdpa", "triton", "reference"]
    assert order["gradient"] == ["triton", "sdpa"]
    assert order["refused"] == {}
    without = chosen_order(lines(failed=["triton/gradient/memory", "score/one"]))
    assert without["step"] == order["step"]
    assert without["gradient"] == ["sdpa"]
    assert without["refused"] == {"score": "score/one: off by 1"}
    assert chosen_order(lines(failed=["triton/memory"]))["step"] == ["sdpa", "reference"]


def test_gates_that_were_cut_short_do_not_count():
    cut = lines()
    part = next(line for line in cut if line["kind"] == "part" and line["part"].startswith("attention-triton"))
    part["reason"] = "ended at its limit of 110 seconds"
    assert chosen_order(cut)["step"] == ["sdpa", "reference"]
    assert chosen_order([line for line in lines() if line["kind"] != "record"]) is None


def test_results_go_into_the_tree(tmp_path):
    measured = tmp_path / "measured.json"
    written = put_into_tree(lines(), tmp_path / "records", measured)
    assert {file.name for file in written} == {"attention-p.json", "gradient-p.json", "gates.json", "measured.json"}
    record = json.loads((tmp_path / "records" / "attention-p.json").read_text())
    assert record["circumstances"] == {"commit": "abc", "modified": False}
    assert json.loads(measured.read_text())["9.0"]["device"] == "NVIDIA X"
    gates = json.loads((tmp_path / "records" / "gates.json").read_text())
    assert gates["device"] == "NVIDIA X"
    assert len(gates["gates"]) == 5


def test_a_rehearsal_says_so_and_changes_nothing(tmp_path):
    assert put_into_tree(lines(rehearsal=True), tmp_path / "records", tmp_path / "measured.json") == []
    assert list(tmp_path.iterdir()) == []
    assert "Nothing here was run on a GPU" in summary(lines(rehearsal=True))
    assert "Nothing here was run on a GPU" in summary([])
    told = summary(lines(failed=["sdpa/memory"]))
    assert "# NVIDIA X" in told
    assert "- sdpa/memory: off by 1" in told


def test_packages_are_carried_along(tmp_path, monkeypatch):
    assert packages.pack(tmp_path) == list(packages.PURE)
    assert {"cattrs", "entrypoints.py"} <= {file.name for file in (tmp_path / "packages").iterdir()}
    monkeypatch.setattr(sys, "path", list(sys.path))
    packages.use_packages(tmp_path)
    assert sys.path[-1] == str(tmp_path / "packages"), "what is installed comes first"
    assert packages.missing() == []
    assert {"commit", "modified"} <= json.loads((tmp_path / "commit.json").read_text()).keys()
    monkeypatch.setattr(packages, "ROOT", tmp_path)
    assert packages.commit(tmp_path) == json.loads((tmp_path / "commit.json").read_text())
