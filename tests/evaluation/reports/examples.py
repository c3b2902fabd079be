"""A report with every kind of arm, to render, draw and write."""

from __future__ import annotations

from mplus.evaluation.reports.cell import Cell
from mplus.evaluation.reports.forgetting_curve import curves
from mplus.evaluation.reports.report import Arm, Report

AGES = (0, 1, 2, 8, 16, 32, 64, 128)
CHANCE = 1 / 32


def arm(name, accuracy, questions=64, **facts):
    """An arm that answers ``accuracy(age)`` of its questions."""
    cells = [Cell(age=age, questions=questions, correct=round(questions * accuracy(age)), **facts) for age in AGES]
    return Arm(name=name, cells=cells)


def example():
    """Three arms that ran, one that did not converge, one that was skipped."""
    halved = Arm(
        name="window",
        status="not_converged",
        reason="0.71 of the questions inside it, at least 0.98 are needed",
        cells=arm("window", lambda age: 0.71 if age < 3 else CHANCE).cells,
    )
    return Report(
        protocol="recall",
        arms=[
            Arm(name="snapkv", status="skipped", reason="no file of answers was given"),
            arm("mplus", lambda age: 1.0, state_bytes=525_312, tokens_attended=52, scores={"f1": 1.0}),
            arm("memoryllm", lambda age: max(CHANCE, 1 - age / 40), state_bytes=32_768, tokens_attended=36),
            arm("none", lambda age: CHANCE, state_bytes=0, tokens_attended=3),
            halved,
        ],
        age_tokens={age: 16.0 * age for age in AGES},
        chance=CHANCE,
        borderline=0.04,
        theory=curves(AGES, 4, 32, CHANCE),
        settings={"prompt": "colour of {name}", "stop": [".", "\n"], "generation": {"tokens": 10, "do_sample": False}},
        deviations=["other distractors"],
        circumstances={"device": "CPU", "seeds": [0]},
    )
