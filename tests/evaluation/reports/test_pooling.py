"""Pooled reports hold the questions of all."""

from __future__ import annotations

import pytest

from mplus.errors import InputError
from mplus.evaluation.reports.merge import pool
from mplus.evaluation.reports.report import Arm, Cell, Report, wilson


def report(correct, status="ok", protocol="recall", name="mplus", borderline=0.1):
    cells = (Cell(age=0, questions=10, correct=correct, state_bytes=7), Cell(age=4, questions=10, correct=1))
    reason = None if status == "ok" else "too little"
    arm = Arm(name=name, status=status, reason=reason, cells=cells)
    return Report(protocol=protocol, arms=(arm,), borderline=borderline)


def test_counts_add_up_and_intervals_are_those_of_all_questions():
    pooled = pool([report(9), report(5, borderline=0.3)])
    cell = pooled.arm("mplus").at(0)
    assert (cell.questions, cell.correct, cell.state_bytes) == (20, 14, 7)
    assert cell.interval == wilson(14, 20)
    assert pooled.arm("mplus").at(4).correct == 2
    assert pooled.borderline == pytest.approx(0.2)


def test_an_arm_must_be_good_in_every_report():
    pooled = pool([report(9), report(1, status="not_converged")])
    assert (pooled.arm("mplus").status, pooled.arm("mplus").reason) == ("not_converged", "too little")


def test_reports_that_do_not_belong_together_are_refused():
    with pytest.raises(InputError, match="at least one report to pool, got none"):
        pool([])
    for other in (report(1, protocol="squad"), report(1, name="none")):
        with pytest.raises(InputError, match="same protocol and arms, got recall with mplus and"):
            pool([report(1), other])
