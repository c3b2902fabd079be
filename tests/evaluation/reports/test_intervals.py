"""Wilson intervals against published values and their own definition."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mplus.errors import InputError
from mplus.evaluation.reports.cell import wilson

Z = 1.959963984540054


@pytest.mark.parametrize(
    ("correct", "questions", "low", "high"),
    [  # Newcombe 1998, table I, method 3 (score without continuity correction)
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_published_intervals(correct, questions, low, high):
    assert wilson(correct, questions) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_its_ends_are_where_the_score_test_turns(case):
    correct, questions = case
    low, high = wilson(correct, questions)
    share = correct / questions
    assert 0 <= low <= share <= high <= 1
    for end in {low, high} - {0.0, 1.0}:
        assert abs(share - end) == pytest.approx(Z * math.sqrt(end * (1 - end) / questions), rel=1e-6)
    assert (low == 0) == (correct == 0)
    assert (high == 1) == (correct == questions)


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_it_is_symmetric_and_grows_with_confidence(case):
    correct, questions = case
    low, high = wilson(correct, questions)
    assert wilson(questions - correct, questions) == pytest.approx((1 - high, 1 - low), abs=1e-12)
    wider = wilson(correct, questions, confidence=0.99)
    assert wider[0] <= low
    assert wider[1] >= high


@pytest.mark.parametrize(("correct", "questions"), [(0, 0), (3, 2), (-1, 5)])
def test_impossible_counts(correct, questions):
    with pytest.raises(InputError, match=f"got {correct} of {questions}"):
        wilson(correct, questions)


def test_impossible_confidence():
    with pytest.raises(InputError, match=r"between 0 and 1, got 1\.0"):
        wilson(1, 2, confidence=1.0)
