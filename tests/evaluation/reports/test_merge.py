"""Reports beside each other, and pooled: what is kept, what is told apart, and what may not be compared."""

from __future__ import annotations

import pytest
from attrs import evolve

from mplus.errors import InputError
from mplus.evaluation.reports.cell import Cell, wilson
from mplus.evaluation.reports.merge import pool, side_by_side
from mplus.evaluation.reports.plots import OTHER, STYLES, draw, styles
from mplus.evaluation.reports.report import Arm, Report
from mplus.evaluation.reports.tables import markdown
from tests.evaluation.reports.examples import example

SETTINGS = {"prompt": "colour of {name}", "rounds": 4}


def report(rows=32, **changes):
    """The example, of a memory with so many short-term rows."""
    facts = {"settings": {**SETTINGS, "memory": {"short_term_tokens": rows}, "long_term_tokens": None}}
    return evolve(example(), **{**facts, **changes})


def test_arms_are_found_under_their_new_names():
    first, second = report(), report(64)
    both = side_by_side({"small": (first, "mplus"), "large": (second, "mplus"), "mplus": (first, "memoryllm")})
    assert [arm.name for arm in both.arms] == ["mplus", "small", "large"], "known names first, others as given"
    assert both.arm("small").cells == first.arm("mplus").cells
    assert both.arm("mplus").cells == first.arm("memoryllm").cells
    assert (both.protocol, both.age_tokens, both.chance) == (first.protocol, first.age_tokens, first.chance)


def test_what_is_common_is_kept_and_what_is_not_is_told_apart():
    first, second = report(), report(64, borderline=0.5, circumstances={"device": "GPU"}, deviations=["another"])
    both = side_by_side({"small": (first, "mplus"), "large": (second, "mplus")})
    assert both.settings == {
        **SETTINGS,
        "memory": {"small": {"short_term_tokens": 32}, "large": {"short_term_tokens": 64}},
        "long_term_tokens": None,
    }
    assert both.circumstances == {"small": first.circumstances, "large": {"device": "GPU"}}
    assert both.borderline is None
    assert both.theory == first.theory
    assert both.deviations == ("other distractors", "another")
    assert "- memory.large.short_term_tokens: `64`" in markdown(both)
    alone = side_by_side({"small": (first, "mplus")})
    assert (alone.settings, alone.circumstances) == (first.settings, first.circumstances)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"protocol": "squad"}, "protocol"),
        ({"settings": {**SETTINGS, "rounds": 5}}, "rounds"),
        ({"settings": {**SETTINGS, "scoring": {"correct": "exact"}}}, "scoring.correct"),
        ({"age_tokens": {0: 0.0, 1: 17.0}}, "age_tokens.1"),
    ],
)
def test_other_questions_are_refused(changes, named):
    with pytest.raises(InputError, match=f"'one' and 'other' differ in .*{named}.*measure both with the same options"):
        side_by_side({"one": (report(), "mplus"), "other": (report(**changes), "mplus")})


def test_nothing_and_a_missing_arm():
    with pytest.raises(InputError, match="at least one report"):
        side_by_side({})
    with pytest.raises(InputError, match="must have an arm 'bm25'"):
        side_by_side({"one": (report(), "bm25")})


def test_arms_with_other_names_look_different(tmp_path):
    looks = styles(["mplus", "ours", "theirs"])
    assert looks["mplus"] == STYLES["mplus"]
    assert len(set(looks.values())) == 3
    many = styles([f"arm {number}" for number in range(len(STYLES) + 2)])
    assert list(many.values())[-2:] == [OTHER, OTHER]
    both = side_by_side({"small": (report(), "mplus"), "large": (report(64), "mplus")})
    [path] = draw(both, tmp_path / "both.svg")
    text = path.read_text()
    assert STYLES["none"][0] in text
    assert STYLES["window"][0] in text


def counted(correct, status="ok", protocol="recall", name="mplus", borderline=0.1):
    cells = (Cell(age=0, questions=10, correct=correct, state_bytes=7), Cell(age=4, questions=10, correct=1))
    reason = None if status == "ok" else "too little"
    arm = Arm(name=name, status=status, reason=reason, cells=cells)
    return Report(protocol=protocol, arms=(arm,), borderline=borderline)


def test_counts_add_up_and_intervals_are_those_of_all_questions():
    pooled = pool([counted(9), counted(5, borderline=0.3)])
    cell = pooled.arm("mplus").at(0)
    assert (cell.questions, cell.correct, cell.state_bytes) == (20, 14, 7)
    assert cell.interval == wilson(14, 20)
    assert pooled.arm("mplus").at(4).correct == 2
    assert pooled.borderline == pytest.approx(0.2)


def test_an_arm_must_be_good_in_every_report():
    pooled = pool([counted(9), counted(1, status="not_converged")])
    assert (pooled.arm("mplus").status, pooled.arm("mplus").reason) == ("not_converged", "too little")


def test_reports_that_do_not_belong_together_are_refused():
    with pytest.raises(InputError, match="at least one report to pool, got none"):
        pool([])
    for other in (counted(1, protocol="squad"), counted(1, name="none")):
        with pytest.raises(InputError, match="same protocol and arms, got recall with mplus and"):
            pool([counted(1), other])
