"""By category, and what was never told: counts and signs beside plain loops over the same answers."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from mplus.evaluation.chat.choice import Choice
from mplus.evaluation.chat.findings import by_category, signs_of_told
from mplus.evaluation.execution.base import Answer, Due
from mplus.evaluation.generating import Generated
from mplus.evaluation.options import ArmOptions
from mplus.evaluation.reports.cell import Cell
from mplus.evaluation.reports.report import Arm, Report
from mplus.evaluation.reports.worth import show_worth, worth_tables
from mplus.evaluation.reports.worth_plots import draw_worth, heat_map
from mplus.evaluation.retention import retention
from mplus.evaluation.tasks import protocol
from mplus.evaluation.tasks.base import Episode, Passage, Question
from mplus.evaluation.texts import Texts
from tests.evaluation import data
from tests.evaluation.chat.small import execution, notes, tokenizer


def answered(category, right, *, needs=(0,), choice=None, likelihood=0.0):
    passages = tuple(Passage(text="x", source=f"s{number}") for number in range(2))
    question = Question(prompt="?", answers=("a",), needs=needs, after=1, category=category)
    made = Generated("", (), 0.0, 0.0, likelihood, 0.0)
    due = Due(Episode(number=0, passages=passages, questions=(question,)), 0, 0, 0)
    return due, Answer(right, None, None, {"f1": 0.5 * right}, choice, made)


def test_categories_are_counted_apart():
    some = [
        answered("one", True, choice=Choice(("s0", "s1"))),
        answered("one", False, needs=(0, 1), choice=Choice(("s1",))),
        answered("two", True),
        answered(None, True),
    ]
    assert by_category(some) == {
        "by_category": {
            "one": {"questions": 2, "correct": 1, "f1": 0.25, "recall": 0.5},
            "two": {"questions": 1, "correct": 1, "f1": 0.5},
        }
    }
    assert by_category(some[3:]) == {}


def test_signs_of_what_was_never_told():
    told = [answered(None, True, likelihood=one, choice=Choice(("s0",), score=one)) for one in (3.0, 1.0)]
    untold = [
        answered(None, False, likelihood=2.0, choice=Choice()),
        answered(None, False, likelihood=0.0, choice=Choice(("s1",), score=2.0)),
    ]
    found = signs_of_told(told, untold)["untold"]
    # Of four pairs the told one is likelier in three; by score, nothing at all is less than any score.
    assert found == {
        "questions": 2,
        "auroc_of_likelihood": 0.75,
        "nothing_brought_back": {"told": 0.0, "untold": 0.5},
        "auroc_of_score": 0.75,
    }
    assert signs_of_told(told, []) == {}


def test_what_was_never_told_is_asked_too():
    made = execution(task=notes(untold=2))
    report = retention(
        made, ArmOptions(arms=("none", "kv", "kv-text", "kv-oracle", "ceiling"), window_converged=0), progress=False
    )
    assert {arm.name for arm in report.arms if "untold" not in arm.details} == {"kv-oracle", "ceiling"}
    for arm in [report.arm(name) for name in ("none", "kv", "kv-text")]:
        assert arm.at(0).questions == 3
        assert arm.details["untold"]["questions"] == 2
        assert 0 <= arm.details["untold"]["auroc_of_likelihood"] <= 1
    assert report.arm("kv").details["untold"]["nothing_brought_back"].keys() == {"told", "untold"}
    head, rows = worth_tables(report)["never told"]
    assert [row[:2] for row in rows] == [["none", "2"], ["kv", "2"], ["kv-text", "2"]]
    assert len(head) == len(rows[0])


def test_needles_make_a_heat_map(tmp_path):
    cls = protocol("needles")
    sizes = {"lengths": [60, 120], "depths": [0, 1], "episodes": 1, "passage_tokens": 40}
    task = cls(cls.Options(data=data.novels(tmp_path / "novels"), **sizes), Texts(tokenizer()))
    made = execution(task=task, tokens=1)
    report = retention(made, ArmOptions(arms=("none", "ceiling", "kv"), window_converged=0), progress=False)
    assert {tokens: list(row) for tokens, row in heat_map(report.arm("kv")).items()} == {60: [0, 1], 120: [0, 1]}
    assert "right, by passages told since" not in worth_tables(report)
    head, rows = worth_tables(report)["right / F1 by category"]
    assert head[1] == "120 tokens at depth 0"
    assert [len(row) for row in rows] == [5, 5, 5]
    for name in ("map.png", "map.svg"):
        draw_worth(report, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000


def test_shares_of_a_heat_map():
    facts = {
        "1000 tokens at depth 0.5": {"questions": 4, "correct": 3, "f1": 0.0},
        "200 tokens at depth 1": {"questions": 2, "correct": 0, "f1": 0.0},
    }
    arm = Arm(name="kv", cells=(Cell(age=0, questions=6, correct=3),), details={"by_category": facts})
    assert heat_map(arm) == {200: {1.0: 0.0}, 1000: {0.5: 0.75}}


@pytest.mark.parametrize("ages", [(0,), (0, 1)])
def test_bars_and_ages(ages, tmp_path):
    cells = tuple(Cell(age=age, questions=4, correct=2) for age in ages)
    report = Report(protocol="squad", arms=(Arm(name="kv", cells=cells),))
    draw_worth(report, tmp_path / "bars.svg")
    first = (tmp_path / "bars.svg").read_bytes()
    draw_worth(report, tmp_path / "bars.svg")
    assert (tmp_path / "bars.svg").read_bytes() == first
    assert ("right, by passages told since" in worth_tables(report)) == (len(ages) > 1)
    console = Console(file=io.StringIO(), width=80)
    show_worth(report, console)
    assert f"{2 * len(ages)}/{4 * len(ages)} 0.50" in console.file.getvalue()
