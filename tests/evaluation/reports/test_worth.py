"""Arms compared question by question, and the table of what a memory is worth."""

from __future__ import annotations

import io
import random

import pytest
from rich.console import Console

from mplus.errors import InputError
from mplus.evaluation.reports.cell import Cell
from mplus.evaluation.reports.paired import difference, outcomes, ratio
from mplus.evaluation.reports.report import Arm, Report
from mplus.evaluation.reports.worth import HEAD, show_worth, worth_markdown, worth_rows


def answered(right):
    return {str(number): bool(one) for number, one in enumerate(right)}


def reference(one, other, measure, draws=4000):
    """Quantiles of a plain loop over samples of the questions."""
    rng, found = random.Random(1), []
    names = list(one)
    for _ in range(draws):
        drawn = [rng.choice(names) for _ in names]
        found.append(measure([one[name] for name in drawn], [other[name] for name in drawn]))
    found.sort()
    return found[round(0.025 * (draws - 1))], found[round(0.975 * (draws - 1))]


def test_intervals_are_those_of_a_plain_loop():
    rng = random.Random(0)
    other = answered(rng.random() < 0.7 for _ in range(60))
    one = {name: right and rng.random() < 0.8 for name, right in other.items()}
    found = difference(one, other)
    low, high = reference(one, other, lambda a, b: sum(a) / 60 - sum(b) / 60)
    assert found.value == pytest.approx(sum(one.values()) / 60 - sum(other.values()) / 60)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.02)
    found = ratio(one, other)
    low, high = reference(one, other, lambda a, b: sum(a) / sum(b))
    assert found.value == pytest.approx(sum(one.values()) / sum(other.values()))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.03)


def test_pairs_are_narrower_than_questions_of_their_own():
    both = answered(number % 2 for number in range(40))
    assert difference(both, both) == difference(both, both, seed=3)
    assert (difference(both, both).low, difference(both, both).high) == (0, 0)
    assert ratio(both, both).low == 1


def test_only_questions_of_both_count():
    one, other = {"a": True, "b": True}, {"b": False, "c": True}
    assert difference(one, other).value == 1
    assert ratio(one, {"a": False, "b": False}) is None
    with pytest.raises(InputError, match="a question in common"):
        difference({"a": True}, {"b": True})


def cell(right, **facts):
    return Cell(age=0, questions=len(right), correct=sum(right), outcomes=answered(right), **facts)


@pytest.fixture
def report():
    kept = {"state_bytes_per_token": 220.0, "cache_bytes_per_token_bf16": 200}
    arms = (
        Arm(name="none", cells=(cell([0, 0, 0, 0], first_token_ms=100.0),)),
        Arm(name="kv", cells=(cell([1, 1, 0, 0], recall=0.75, first_token_ms=135.0),), details=kept),
        Arm(name="kv-text", cells=(cell([1, 0, 0, 0]),)),
        Arm(name="ceiling", cells=(cell([1, 1, 1, 0], first_token_ms=150.0),)),
        Arm(name="snapkv", status="skipped", reason="no answers"),
    )
    return Report(protocol="notes", arms=arms, settings={"memory": {"kv": {"digest": "0123456789ab"}}})


def test_the_table(report):
    rows = {row[0]: dict(zip(HEAD, row, strict=True)) for row in worth_rows(report)}
    assert list(rows) == ["none", "kv", "kv-text", "ceiling"]
    assert rows["kv"]["right"] == "2/4 0.50"
    assert rows["kv"]["of the ceiling"].startswith("0.67 [")
    assert rows["kv"]["evidence"] == "0.75"
    assert rows["kv"]["first token"] == "135 ms 1.35x"
    assert rows["kv"]["state / token"] == "220 B 1.10x"
    assert rows["ceiling"]["of the ceiling"] == "1.00 [1.00, 1.00]"
    assert rows["none"]["evidence"] == ""
    assert outcomes(report.arm("kv")) == answered([1, 1, 0, 0])


def test_it_is_whole_in_every_width_and_in_markdown(report):
    for width in (40, 200):
        console = Console(file=io.StringIO(), width=width)
        show_worth(report, console)
        text = console.file.getvalue()
        assert "135 ms 1.35x" in text
        assert "digest 0123456789ab" in text.replace("\n", " ")
    lines = worth_markdown(report).splitlines()
    assert "| " + " | ".join(HEAD) + " |" in lines
    assert "- snapkv: skipped (no answers)" in lines
    assert any(line.startswith("- kv less kv-text, question by question: +0.25 [") for line in lines)
