"""The pages of benchmarks and the README say what the committed records say, and every record is on a page."""

from __future__ import annotations

import json

import pytest

from benchmarks.pages import (
    architectures,
    chat,
    field,
    gpu,
    index,
    memory,
    plan,
    quality,
    readme,
    retrieval,
    serving,
    speed,
    training,
)
from benchmarks.quality.architectures.comparisons import HYBRID_TOLERANCE, SEARCHES, TOLERANCE
from benchmarks.quality.architectures.decoders import ARCHITECTURES, BY_NAME
from benchmarks.quality.architectures.measure import COLUMNS
from benchmarks.records import ROOT, load

PAGES = {
    "index": index,
    "chat": chat,
    "quality": quality,
    "memory": memory,
    "speed": speed,
    "retrieval": retrieval,
    "gpu": gpu,
    "architectures": architectures,
    "training": training,
    "field": field,
    "serving": serving,
    "plan": plan,
}
RECORDS = sorted(ROOT.glob("benchmarks/*/records/*.json"))
WRITE = "run: python -m benchmarks.pages"
ELSEWHERE = {"demo", "chat-demo"}
"""Records that the README quotes."""


@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_made_from_the_records(name):
    page = PAGES[name]
    assert page.PAGE.read_text(encoding="utf-8") == page.render(), WRITE


@pytest.mark.parametrize("name", ["memory", "speed", "retrieval"])
def test_the_figures_are_made_from_the_records(name):
    for file, drawn in PAGES[name].figures().items():
        assert file.read_text(encoding="utf-8") == drawn, WRITE


def test_every_figure_is_on_a_page():
    shown = "".join(file.read_text(encoding="utf-8") for file in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
    for figure in (ROOT / "docs" / "assets").glob("*.svg"):
        assert figure.name in shown, figure


def quotes():
    records = (("quality", "chat-demo"), ("quality", "recall-tiny"), ("speed", "demo"))
    makers = (readme.chat, readme.recall, readme.demo)
    return [make(load(*record)) for make, record in zip(makers, records, strict=True)]


def test_the_readme_quotes_the_records():
    page = readme.PAGE.read_text(encoding="utf-8")
    assert readme.render(page) == page, WRITE
    for quote in quotes():
        assert quote in page


def test_rendering_the_readme_replaces_the_quotes_and_nothing_else():
    page = readme.PAGE.read_text(encoding="utf-8")
    for quote in quotes():
        other = page.replace(quote, "> something else\n")
        assert other != page
        assert readme.render(other) == page


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.stem)
def test_every_record_is_on_a_page(record):
    if record.stem not in ELSEWHERE:
        assert any(record.stem in page.PAGE.read_text(encoding="utf-8") for page in PAGES.values()), (
            f"name {record.relative_to(ROOT)} on a page that it is for (benchmarks/pages)"
        )


def test_pages_say_whether_a_gpu_has_run_it():
    """As long as there is no record of a run, they say that there was none."""
    said = {
        "docs/kernels.md": "**None of them has been run on a GPU yet.**",
        "docs/benchmarks/gpu.md": "**Nothing of mplus was run on a GPU",
        "docs/limits.md": "No speed or memory use on a GPU is known",
        "README.md": "**No GPU run.**",
    }
    for page, words in said.items():
        assert (words in (ROOT / page).read_text(encoding="utf-8")) != gpu.recorded(), page


def test_the_page_shows_a_run_on_a_gpu(tmp_path, monkeypatch):
    where = {
        "device": "NVIDIA X",
        "capability": "9.0",
        "torch": "2",
        "cuda": "13",
        "transformers": "5",
        "commit": "abc",
    }
    gates = [
        {"part": "stores", "gate": name, "status": name, "reason": name * 2} for name in ("ok", "failed", "skipped")
    ]
    parts = [{"part": "stores", "status": "failed", "reason": "1 gates failed"}]
    parts.append({"part": "tiered", "status": "failed", "reason": "ended at its limit"})
    steps = {"kind": "batch", "cases": [{"users": 32, "ms": {"step": 1.5}, "ratios": {}}]}
    records = {
        "gates": {**where, "date": "2026-01-01", "parts": parts, "gates": gates},
        "read-p": reads(),
        "batch-p": steps,
    }
    for name, record in records.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    monkeypatch.setattr(gpu, "FOLDER", tmp_path)
    monkeypatch.setattr(gpu, "load", lambda kind, name: records[name])
    page = gpu.render()
    assert "NVIDIA X, compute capability 9.0" in page
    assert "| `stores` | 1 | 1 | 1 |" in page
    assert "- `failed`: failedfailed" in page
    assert "- `tiered`: ended at its limit" in page
    assert "| users 32 | step | 1.500 |" in page
    assert "| mplus/sdpa | 4.000 |" in page
    assert all(f"benchmarks/gpu/records/{name}.json" in page for name in records)
    assert gpu.NONE.strip() not in page


def test_nothing_that_is_timed_computed_something_wrong():
    for path in speed.FOLDER.glob("bench-*.json"):
        record = load("speed", path.stem)
        assert record["circumstances"]["commit"], path
        assert all(facts["status"] != "failed" for facts in record["gate"].values()), path


def test_the_shipped_decoder_is_that_of_the_first_seed():
    record = load("quality", "recall-tiny")
    first = next(iter(record["seeds"]))
    card = (ROOT / "mplus" / "data" / "recall-tiny" / "README.md").read_text(encoding="utf-8")
    assert f"(seed {first})" in card
    assert list(map(int, record["seeds"])) == record["seeds_asked_for"], "no seed is left out"


def test_an_index_keeps_what_exact_retrieval_answers():
    """At every age, within what as many questions can tell apart."""
    found = load("quality", "retrieval-retention")["by_score"]["mean_dot"]
    arms = {arm["name"]: arm["accuracy_by_age"] for arm in found["report"]["arms"]}
    for age, exact in arms["mplus"].items():
        for name in ("mplus-faiss_ivf", "mplus-faiss_ivf-few", "mplus-centroid"):
            assert arms[name][age] == pytest.approx(exact, abs=0.02), (name, age)


def test_keys_are_of_text_without_repeated_sentences():
    keys = load("speed", "retrieval-speed")["keys"]
    assert keys["distinct_sentences"] == keys["memories"] * keys["chunks"] == keys["rows"] // 4


def test_every_architecture_is_recorded_within_the_tolerances():
    record = load("quality", "architectures")
    assert len(record) >= 2, "both the oldest supported and the newest transformers are measured"
    for run in record.values():
        assert run["rows"].keys() == {architecture.name for architecture in ARCHITECTURES}
        for name, row in run["rows"].items():
            architecture = BY_NAME[name]
            assert ("refused" in row) == (architecture.refused is not None)
            if architecture.refused is not None:
                continue
            allowed = HYBRID_TOLERANCE if architecture.hybrid else TOLERANCE
            assert all(row[column] is None or row[column] <= allowed for column in COLUMNS), name
            assert row["generate"] == (sorted(SEARCHES) if architecture.stable_cache else None)


def entry(p50):
    return {"status": "ok", "p20_ms": p50 / 2, "p50_ms": p50, "p80_ms": 2 * p50, "runs": 3}


def reads():
    """A small record of reads as ``mplus bench`` writes it."""
    arms = {"mplus/sdpa": entry(8.0), "floor": entry(2.0), "odd": {"status": "failed", "reason": "wrong by 1"}}
    arms["gone"] = {"status": "skipped", "reason": "no GPU"}
    read = {"arms": arms, "floor_attention": {"won": "bool mask"}, "best_backend": "sdpa"}
    decode = {"arms": {"floor": {**entry(1.0), "share_of_roofline": 0.5}}, "best_backend": None, "ratios": {}}
    machine = {"copy_gb_per_s": 1.0, "fresh_gb_per_s": 0.5, "matmul_gflop_per_s": 3.0, "matmul_dtype": "float32"}
    machine["load_average"] = [0.5, 1.0]
    section = {"machine": machine, "by_length": {"16": {**read, "ratios": {"mplus_over_floor": 4.0}}}, "decode": decode}
    where = {"device": "CPU", "torch": "2", "transformers": "5", "mplus": "0", "commit": "abc", "date": "2026-01-01"}
    return {
        "kind": "read",
        "preset": {"name": "p", "layers": 1, "hidden_size": 8, "dtype": "float32", "long_term_rows": 9, "prompt": 4},
        "prefix_rows": 5,
        "circumstances": where,
        "gate": {name: arms[name] for name in ("odd", "gone")},
        "by_threads": {"1": section, "2": section},
    }


def test_a_record_of_reads_becomes_tables_and_bars():
    text = "\n\n".join(speed.section("p", reads()))
    assert text.count("| mplus/sdpa | 4.000 | 8.000 | 16.000 | 4.00 |") == 1, "one number of threads"
    assert "| odd | failed | - | - | - |" in text
    assert "- odd: failed: wrong by 1" in text
    assert "| gone |" not in text
    assert "Not measured here, for the reasons in the record: `gone`." in text
    assert text.count("the machine copies 1.0 GB/s") == 1, "once for all tables"
    drawn = speed.figure(reads())
    assert drawn.count("<rect") == 3
    assert "8.0 ms" in drawn


def test_the_page_on_serving_shows_records_and_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(serving, "FOLDER", tmp_path)
    assert serving.render().count("**Not measured yet**") == len(serving.MEASUREMENTS)
    about = {"device": "a machine", "torch": "2", "commit": "c0ffee"}
    times = {"p50_ms": 12.0, "p95_ms": 34.0, "p99_ms": 56.0}
    users = {"tokens_per_second": 789.0, "first_token": times, "gap": times, "texts": 4, "texts_equal_to_alone": 3}
    rounds = [{"load_average": 0.1, "users 8": users, "generate": 11.0}]
    records = {
        "load": {**about, "settings": {"users": [8]}, "rounds": rounds, "over_generate": 8.5},
        "kill9": {**about, "lost": [], "doubled": ["note 3"], "points": [{"s": 1}] * 100},
    }
    for name, record in records.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(record), encoding="utf-8")
    page = serving.render()
    assert "| users 8 | 789 | 12 | 34 | 12 | 56 | 3 of 4 |" in page
    assert "over generate: 8.5" in page
    assert "| lost | none |\n| doubled | note 3 |" in page
    assert "| s |" not in page, "too long to be shown"
    assert "One engine gave 789 tokens/s" in plan.throughput(records["load"], {10: 800.0})
