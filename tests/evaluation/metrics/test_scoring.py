"""Scores by hand; exact match and F1 against values of the official SQuAD script."""

from __future__ import annotations

import pytest

from mplus.errors import ConfigError
from mplus.evaluation.metrics.scoring import Scoring, f1, normalised


def test_cutting_at_the_first_stop():
    assert Scoring().cut("  Paris is\nnot Rome") == "Paris is"
    assert Scoring(stop=(".", "Question")).cut("Paris Question: x. y") == "Paris"
    assert Scoring(stop=()).cut("a\nb ") == "a\nb"


@pytest.mark.parametrize(
    ("rule", "text", "answer", "expected"),
    [
        ({}, "It is Paris now", "Paris", True),
        ({}, "It is paris now", "Paris", False),
        ({"normalise": "squad"}, "It is paris, now", "Paris", True),
        ({}, "comparison", "Paris", False),
        ({}, "13 cows", "3", True),
        ({"correct": "contains_words"}, "13 cows", "3", False),
        ({"correct": "contains_words"}, "(3) cows", "3", True),
        ({"correct": "contains_words"}, "cost: $12", "$12", True),
        ({"correct": "exact"}, "Paris", "Paris", True),
        ({"correct": "exact"}, "Paris now", "Paris", False),
        ({"correct": "exact", "normalise": "squad"}, "the Paris!", "paris", True),
        ({}, "Rome\nParis", "Paris", False),  # after the stop
        ({"normalise": "squad"}, "anything", "the", False),  # normalised away, it must not be a part of everything
        ({"normalise": "squad"}, "I mean the one", "the", True),
    ],
)
def test_correct(rule, text, answer, expected):
    assert Scoring(**rule).is_correct(text, (answer,)) is expected


def test_any_of_several_answers_will_do_and_none_never():
    assert Scoring().is_correct("in 1990", ("ninety", "1990"))
    assert not Scoring().is_correct("in 1990", ())
    assert Scoring().scores("in 1990", ()) == {"exact_match": 0.0, "f1": 0.0}


def test_exact_match_and_f1():
    assert normalised("The  Cat, a dog.") == "cat dog"
    assert f1("the red cat", "a cat") == pytest.approx(2 * 1 / 3)
    assert f1("cat cat", "cat") == pytest.approx(2 / 3)
    assert f1("", "the") == 1.0
    assert f1("dog", "cat") == 0.0
    assert Scoring().scores("The Cat\nx", ("dog", "cat")) == {"exact_match": 1.0, "f1": 1.0}


def test_bad_rules():
    with pytest.raises(ConfigError, match="correct must be one of 'contains', 'contains_words', 'exact', got 'maybe'"):
        Scoring(correct="maybe")
