"""Records of ``mplus bench``, the checks before anything is timed, and the command. No test asserts a time."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager

import pytest
import torch
from typer.testing import CliRunner

from mplus.backends import BACKENDS
from mplus.backends.base import AttentionResult
from mplus.backends.sdpa import SdpaBackend
from mplus.bench import attention, decode, read, score, store, write
from mplus.bench.correctness import CheckResult, check_backend
from mplus.bench.presets import Preset, check_room, preset
from mplus.bench.record import MachineRates, failed
from mplus.bench.tables import opening, refused, tables
from mplus.cli import app
from mplus.errors import NotSupported
from mplus.eviction.base import FifoEviction

TINY = preset("tiny")
CPU = torch.device("cpu")
RATIOS = {
    "published_over_mplus",
    "mplus_over_floor",
    "mplus_over_hf_prefix",
    "mplus_over_floor_without_retrieval",
    "decode_over_floor",
}


class Halved(SdpaBackend):
    """Computes something else."""

    name = "halved"

    def attend(self, request):
        return AttentionResult(super().attend(request).output / 2)


class Broken(SdpaBackend):
    """Ends in an error."""

    name = "broken"

    def attend(self, request):
        raise RuntimeError("no such instruction")


class Unable(SdpaBackend):
    """Refuses every request."""

    name = "unable"

    def unsupported_reasons(self, request):
        return ["needs a device that is not there"]


@contextmanager
def registered(*backends):
    for backend in backends:
        BACKENDS.register(backend.name, backend)
    try:
        yield
    finally:
        for backend in backends:
            BACKENDS.unregister(backend.name)


def run(*arguments):
    return CliRunner().invoke(app, ["bench", *arguments], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


def check_entry(entry):
    assert entry["status"] in {"ok", "skipped", "failed"}
    if entry["status"] == "ok":
        assert 0 < entry["p20_ms"] <= entry["p50_ms"] <= entry["p80_ms"]
        assert entry["runs"] >= 1
    else:
        assert "p50_ms" not in entry
        assert entry["reason"]


def check_record(record, kind):
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["kind"] == kind
    assert record["preset"]["name"] == "tiny"
    assert {"date", "commit", "torch", "transformers", "device", "threads"} <= set(record["circumstances"])
    for section in record["by_threads"].values():
        assert {"copy_gb_per_s", "fresh_gb_per_s", "matmul_gflop_per_s"} <= set(section["machine"])
    assert failed(record) == {}
    assert opening(record)
    for table in tables(record):
        assert all(len(row) == len(table.head) for row in table.rows)


BACKENDS_HERE = ("merge", "sdpa", "triton")


@pytest.fixture(scope="module")
def reads():
    return read.measure(TINY, CPU, [1], 2, growth=True)


def test_a_record_of_reads(reads):
    check_record(reads, "read")
    assert set(reads["ratios"]) >= RATIOS
    assert all(value > 0 for value in reads["ratios"].values())
    assert reads["best_backend"] in {"merge", "sdpa"}
    assert set(reads["by_length"]) == {"4", "8"}
    ways = ("mplus", "mplus/mean_dot", "mplus/no_retrieval")
    arms = {"hf_prefix", "floor", "published", *(f"{way}/{name}" for way in ways for name in BACKENDS_HERE)}
    for facts in reads["by_threads"]["1"]["by_length"].values():
        assert set(facts["arms"]) == arms
        assert facts["floor_attention"]["won"] in facts["floor_attention"]["ms"]
        for name, entry in facts["arms"].items():
            check_entry(entry)
            assert (entry["status"] == "skipped") == name.endswith("/triton")
    decoded = {"hf_prefix", "floor", "mplus/merge", "mplus/sdpa"}
    assert set(reads["by_threads"]["1"]["decode"]["arms"]) == decoded


def test_growth_fills_short_term_memory_first(reads):
    first, last = reads["growth"][0], reads["growth"][-1]
    assert (first["short_term_rows"], first["long_term_rows"]) == (48, 16)
    assert (last["short_term_rows"], last["long_term_rows"]) == (48, 208)
    assert set(last["arms"]) == {
        "floor",
        *(f"{what}/{score}" for what in ("read", "select") for score in ("mean_dot", "sigmoid_mean")),
    }


@pytest.mark.parametrize(
    ("kind", "measure"),
    [
        ("decode", decode.measure),
        ("write", write.measure),
        ("score", score.measure),
        ("attention", attention.measure),
        ("store", store.measure),
    ],
)
def test_the_other_records(kind, measure):
    threads = torch.get_num_threads()
    record = measure(TINY, CPU, [1], 1)
    check_record(record, kind)
    assert torch.get_num_threads() == threads
    section = record["by_threads"]["1"]
    parts = [section]
    if kind == "score":
        parts = [facts for by_length in section["by_rows"].values() for facts in by_length.values()]
    elif kind == "attention":
        parts = section["cases"]
    for part in parts:
        for entry in part["arms"].values():
            check_entry(entry)
    skipped = {name for name, facts in record["gate"].items() if facts["status"] == "skipped"}
    assert skipped == {name for name in record["gate"] if name.endswith("/triton")}


def test_what_is_wrong_gets_no_speed():
    with registered(Halved, Broken, Unable):
        record = read.measure(TINY, CPU, [1], 1, backends=["sdpa", "halved", "broken", "unable"], lengths=[4])
    assert set(failed(record)) == {
        f"mplus/{score}{name}" for name in ("halved", "broken") for score in ("", "mean_dot/", "no_retrieval/")
    }
    arms = record["by_threads"]["1"]["by_length"]["4"]["arms"]
    for entry in arms.values():
        check_entry(entry)
    assert arms["mplus/halved"]["status"] == "failed"
    assert "differs from float64 by" in arms["mplus/halved"]["reason"]
    assert "no such instruction" in arms["mplus/broken"]["reason"]
    assert arms["mplus/unable"]["status"] == "skipped"
    assert "not there" in arms["mplus/unable"]["reason"]
    assert record["best_backend"] == "sdpa"
    assert any("mplus/halved: failed" in line for line in refused(record))


def test_without_any_backend_there_are_no_ratios_of_mplus():
    with registered(Halved):
        record = read.measure(TINY, CPU, [1], 1, backends=["halved"], lengths=[4])
    assert record["best_backend"] is None
    assert record["ratios"]["mplus_over_floor"] is None
    assert record["ratios"]["hf_prefix_over_floor"] > 0


def test_the_command_fails_when_something_was_wrong():
    with registered(Halved):
        result = run("attention", "--preset", "tiny", "--repeats", "1", "--backends", "halved")
    assert result.exit_code == 1
    assert "backend/halved: failed" in result.stdout


def test_a_store_that_keeps_other_rows_gets_no_speed(monkeypatch):
    assert store.check(TINY, CPU, "ram").status == "ok"
    newest = lambda self, store, layer, excess: store.ids(layer)[-excess:]  # noqa: E731
    monkeypatch.setattr(FifoEviction, "select", newest)
    record = store.measure(TINY, CPU, [1], 1)
    assert {entry["status"] for entry in record["by_threads"]["1"]["arms"].values()} == {"failed"}
    assert "other rows are left" in failed(record)["evict/256"]


def test_layers_stay_at_their_capacity():
    layer = store.FullLayer(TINY, CPU, "ram", 500)
    for turn in range(60):
        layer.prepare(turn)
        layer.append(turn)
        layer.evict(turn)
        layer.merge(turn)
        assert layer.flowing.count(0) == 500
        assert 500 - 2 * TINY.memory_tokens_per_chunk <= layer.merging.count(0) <= 500


def test_checks_see_nan():
    result = CheckResult()
    result.compare("it", torch.tensor([math.nan]), torch.ones(1, dtype=torch.float64), torch.ones(1))
    assert result.status == "failed"


def test_good_backends_pass():
    for name in ("merge", "sdpa", "reference"):
        assert check_backend(name, TINY, CPU).status == "ok"


def test_the_command_writes_a_record(tmp_path):
    result = run("decode", "--preset", "tiny", "--repeats", "1", "--threads", "1", "--json", str(tmp_path / "d.json"))
    assert result.exit_code == 0, result.output
    assert "One token behind a prompt of 4, 1 thread" in result.stdout
    check_record(json.loads((tmp_path / "d.json").read_text(encoding="utf-8")), "decode")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("read", "--preset", "gpu"), "preset must be one of cpu, llama3-8b"),
        (("read", "--preset", "tiny", "--device", "abacus"), "device must be"),
        (("read", "--preset", "tiny", "--device", "meta"), "device must be cpu or cuda"),
        (("read", "--preset", "tiny", "--threads", "0"), "--threads must be numbers of at least 1"),
        (("read", "--preset", "tiny", "--threads", "1,1"), "--threads must be different numbers"),
        (("read", "--preset", "tiny", "--lengths", "x"), "--lengths must be whole numbers"),
        (("attention", "--preset", "tiny", "--backends", "sdp"), "did you mean 'sdpa'"),
        (("read", "--preset", "tiny", "--long-term", "900000000000"), "take fewer long-term rows"),
    ],
)
def test_errors_are_one_line(arguments, says):
    result = run(*arguments)
    assert result.exit_code == 2
    [line] = result.stderr.splitlines()
    assert says in line


def test_presets_that_need_a_gpu_say_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run("read", "--preset", "llama3-8b")
    assert result.exit_code == 2
    assert "needs a GPU" in result.stderr
    assert "--device cpu" in result.stderr


def test_room_is_checked_before_anything_is_made(monkeypatch):
    monkeypatch.setattr("mplus.bench.presets.free_bytes", lambda device: 2**30)
    with pytest.raises(NotSupported, match="GiB"):
        check_room(preset("llama3-8b"), CPU)
    check_room(TINY, CPU)


def test_presets_have_the_sizes_they_are_named_for():
    cpu, large = preset("cpu"), preset("llama3-8b")
    assert cpu.prefix_rows == large.prefix_rows == 12_801
    assert isinstance(cpu, Preset)
    assert 90e9 < large.nbytes < 120e9


def test_the_roofline_is_the_slower_of_the_two():
    rates = MachineRates(bytes_per_second=10, fresh_bytes_per_second=10, flops_per_second=100, dtype="float32")
    assert rates.roofline_share(flops=100, nbytes=20, seconds=4) == 0.5
    assert rates.roofline_share(flops=800, nbytes=20, seconds=8) == 1.0
