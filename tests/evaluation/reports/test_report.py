"""Reports as data, as JSON and as tables."""

from __future__ import annotations

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mplus.errors import ConfigError, InputError
from mplus.evaluation.reports.cell import Cell
from mplus.evaluation.reports.report import ARMS, Arm, Report
from mplus.evaluation.reports.tables import markdown, remarks, show, size
from tests.evaluation.reports.examples import AGES, arm, example


def test_the_json_of_a_report():
    plain = json.loads(json.dumps(example().plain()))
    assert [one["name"] for one in plain["arms"]] == ["none", "window", "memoryllm", "mplus", "snapkv"]
    mplus = plain["arms"][3]
    assert mplus["status"] == "ok"
    assert mplus["reason"] is None
    assert mplus["accuracy_by_age"] == {str(age): 1.0 for age in AGES}
    assert mplus["questions_by_age"]["128"] == mplus["correct_by_age"]["128"] == 64
    assert mplus["intervals_by_age"]["0"] == [pytest.approx(0.9434, abs=1e-4), 1.0]
    assert mplus["scores_by_age"] == {"f1": {str(age): 1.0 for age in AGES}}
    assert (mplus["state_bytes"], mplus["tokens_attended"]) == (525_312, 52)
    skipped = plain["arms"][4]
    assert (skipped["status"], skipped["reason"]) == ("skipped", "no file of answers was given")
    assert skipped["accuracy_by_age"] == {}
    assert skipped["state_bytes"] is None
    assert plain["age_tokens"]["128"] == 2048
    assert plain["chance"] == 1 / 32
    assert plain["theory"][1]["accuracy_by_age"]["0"] == 1.0


def test_round_trip(tmp_path):
    report = example()
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == report


cells = st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 500), st.integers(0, 500)), unique_by=lambda c: c[0])


@given(cells, st.sampled_from(ARMS))
def test_round_trip_of_any_cells(cells, name):
    made = Arm(name=name, cells=[Cell(age=a, questions=max(q, c), correct=c) for a, q, c in cells])
    report = Report(protocol="any", arms=[made])
    assert Report.from_plain(json.loads(json.dumps(report.plain()))) == report


def test_arms_come_in_a_fixed_order_and_unknown_ones_last():
    report = Report(protocol="p", arms=[arm("mine", lambda _: 1), *(arm(name, lambda _: 1) for name in ARMS[::-1])])
    assert [one.name for one in report.arms] == [*ARMS, "mine"]


def test_reach_is_the_age_in_tokens_over_what_is_attended():
    report = example()
    assert report.reach("mplus") == 128 * 16 / 52
    assert report.reach("memoryllm") == 2 * 16 / 36
    assert report.reach("none") is None
    assert report.reach("snapkv") is None


def test_bad_reports(tmp_path):
    with pytest.raises(InputError, match=r"correct must not exceed questions \(2\), got 3"):
        Cell(age=0, questions=2, correct=3)
    with pytest.raises(ConfigError, match="age must be a whole number of at least 0, got -1"):
        Cell(age=-1, questions=2, correct=1)
    with pytest.raises(InputError, match="a reason exactly when its status is not 'ok'"):
        Arm(name="bm25", status="skipped")
    with pytest.raises(ConfigError, match="status must be one of"):
        Arm(name="bm25", status="fine", reason="x")
    with pytest.raises(InputError, match="one cell per age"):
        Arm(name="bm25", cells=[Cell(age=1, questions=1, correct=1)] * 2)
    with pytest.raises(InputError, match="each arm once, got none, none"):
        Report(protocol="p", arms=[arm("none", lambda _: 1)] * 2)
    with pytest.raises(InputError, match="must have an arm 'bm25', it has none"):
        Report(protocol="p", arms=[arm("none", lambda _: 1)]).arm("bm25")
    plain = example().plain()
    with pytest.raises(InputError, match="format of a report must be 1, got 2"):
        Report.from_plain({**plain, "format": 2})
    with pytest.raises(InputError, match="kind = 'retention'"):
        Report.from_plain({**plain, "kind": "harm"})
    with pytest.raises(InputError, match="'chance'"):
        Report.from_plain({name: value for name, value in plain.items() if name != "chance"})
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(InputError, match=r"broken\.json must be valid JSON"):
        Report.load(tmp_path / "broken.json")


def test_markdown():
    text = markdown(example())
    lines = text.splitlines()
    assert lines[0] == "| arm | 0 | 1 | 2 | 8 | 16 | 32 | 64 | 128 | state | attended |"
    assert "| mplus | 1.00 | 1.00 | 1.00 | 1.00 | 1.00 | 1.00 | 1.00 | 1.00 | 513.0 KiB | 52 |" in lines
    assert "| one row (theory) | 1.00 | 0.88 | 0.77 | 0.36 | 0.15 | 0.04 | 0.03 | 0.03 |  |  |" in lines
    assert not any(line.startswith(("| window", "| snapkv")) for line in lines)
    assert "- window: not converged (0.71 of the questions inside it, at least 0.98 are needed)" in lines
    assert "- snapkv: skipped (no file of answers was given)" in lines
    assert "- differs from the published protocol: other distractors" in lines
    assert "- generation.tokens: `10`" in lines
    assert '- stop: `[".", "\\n"]`' in lines
    assert "- chance: 0.031" in lines


def test_shares_are_never_rounded_up_to_one():
    text = markdown(Report(protocol="p", arms=[arm("mplus", lambda age: 0.999, questions=1000)]))
    assert "| mplus | 0.99 |" in text


@pytest.mark.parametrize("width", [50, 80, 200])
def test_the_table_on_a_terminal_fits(width):
    console = Console(file=io.StringIO(), width=width, highlight=False)
    show(example(), console)
    text = console.file.getvalue()
    table = text[: text.index("state")]
    assert "…" not in text
    assert all(len(line) <= width for line in table.splitlines())
    assert text.count("memoryllm") == (3 if width == 50 else 2)
    for remark in remarks(example()):
        assert remark.split()[0] in text


def test_sizes():
    assert [size(n) for n in (None, 0, 1023, 1536, 5 * 2**20, 3 * 2**30)] == [
        "", "0 B", "1023 B", "1.5 KiB", "5.0 MiB", "3.0 GiB",
    ]  # fmt: skip
