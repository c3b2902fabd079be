"""The page of speeds says what the records say, also when there are none."""

from __future__ import annotations

import json

from benchmarks.pages import speed as speed_page


def test_the_page_is_made_from_the_records():
    page = speed_page.PAGE.read_text(encoding="utf-8")
    assert page == speed_page.render(speed_page.load()), "run: python -m benchmarks.pages.speed"


def test_the_figures_are_made_from_the_records():
    reads = {name: record for name, record in speed_page.load().items() if record["kind"] == "read"}
    for name, record in reads.items():
        written = (speed_page.FIGURES / speed_page.figure_name(name)).read_text(encoding="utf-8")
        assert written == speed_page.figure(record), "run: python -m benchmarks.pages.speed"
    figures = {path.name for path in speed_page.FIGURES.glob("speed-*.svg")}
    assert figures == {speed_page.figure_name(name) for name in reads}


def test_nothing_recorded_was_wrong():
    for name, record in speed_page.load().items():
        assert record["circumstances"]["commit"], name
        assert all(facts["status"] != "failed" for facts in record["gate"].values()), name


def test_without_records_the_page_says_so(tmp_path):
    assert speed_page.load(tmp_path) == {}
    assert speed_page.NOTHING in speed_page.render({})


def entry(p50):
    return {"status": "ok", "p20_ms": p50 / 2, "p50_ms": p50, "p80_ms": 2 * p50, "runs": 3}


def record():
    """A small record of reads as ``mplus bench`` writes it."""
    arms = {"mplus/sdpa": entry(8.0), "floor": entry(2.0), "odd": {"status": "failed", "reason": "wrong by 1"}}
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
        "gate": {"odd": {"status": "failed", "reason": "wrong by 1"}},
        "by_threads": {"1": section},
    }


def test_a_record_becomes_tables_and_a_figure(tmp_path):
    (tmp_path / "bench-read-p.json").write_text(json.dumps(record()), encoding="utf-8")
    page = speed_page.render(speed_page.load(tmp_path))
    assert "### read-p" in page
    assert "| mplus/sdpa | 4.000 | 8.000 | 16.000 | 4.00 |" in page
    assert "| odd | failed | - | - | - |" in page
    assert "- odd: failed: wrong by 1" in page
    drawn = speed_page.figure(record())
    assert drawn.count("<rect") == 3
    assert "8.0 ms" in drawn
