"""AUROC against counting pairs, and calibration against what it must find."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mplus.errors import InputError
from mplus.evaluation.abstention import Logistic, auroc, compare, judge, threshold

SCORES = st.lists(st.integers(-5, 5) | st.floats(-3, 3, width=32), min_size=1, max_size=30)


@given(SCORES, SCORES)
def test_it_counts_pairs(positive, negative):
    wins = sum((p > n) + (p == n) / 2 for p in positive for n in negative)
    found = auroc(torch.tensor(positive, dtype=torch.float64), torch.tensor(negative, dtype=torch.float64))
    assert found == pytest.approx(wins / (len(positive) * len(negative)), abs=1e-12)


@given(SCORES, SCORES)
def test_swapping_the_kinds_gives_the_rest(positive, negative):
    one, other = torch.tensor(positive, dtype=torch.float64), torch.tensor(negative, dtype=torch.float64)
    assert auroc(one, other) + auroc(other, one) == pytest.approx(1)


def test_by_hand():
    assert auroc(torch.tensor([3.0, 2.0]), torch.tensor([1.0])) == 1
    assert auroc(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 1.0])) == 0.5
    assert auroc(torch.tensor([0.8, 0.4]), torch.tensor([0.6, 0.2])) == 0.75


def test_impossible_scores():
    with pytest.raises(InputError, match="got 0 positive and 1 negative"):
        auroc(torch.tensor([]), torch.tensor([1.0]))
    with pytest.raises(InputError, match="finite scores"):
        auroc(torch.tensor([float("nan")]), torch.tensor([1.0]))


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=25))
def test_no_other_threshold_is_better(questions):
    told = torch.tensor([truth for _, truth in questions])
    scores = torch.tensor([float(score) for score, _ in questions])
    if bool(told.all()) or not bool(told.any()):
        with pytest.raises(InputError, match="what was told and about what was not"):
            threshold(scores, told)
        return
    best = judge(scores, told, threshold(scores, told)).accuracy
    for cut in [-1.0, *[number + 0.5 for number in range(7)]]:
        assert judge(scores, told, cut).accuracy <= best + 1e-12


def test_judging_by_hand():
    scores, told = torch.tensor([0.9, 0.6, 0.5, 0.1]), torch.tensor([True, True, False, False])
    found = judge(scores, told, 0.55, probability=True)
    assert (found.auroc, found.answered, found.abstained, found.accuracy) == (1, 1, 1, 1)
    assert found.brier == pytest.approx((0.01 + 0.16 + 0.25 + 0.01) / 4)
    found = judge(scores, told, 0.7)
    assert (found.answered, found.abstained, found.accuracy, found.brier) == (0.5, 1, 0.75, None)
    assert threshold(scores, told) == pytest.approx(0.55)


def drawn(n=4000, seed=0):
    """Two useful features, one turned round, and one that says nothing; told with a known probability."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    probability = (2 * x[:, 0] - x[:, 1]).sigmoid()
    told = torch.rand(n, generator=generator, dtype=torch.float64) < probability
    return x * torch.tensor([1.0, 5.0, 100.0]) + 7, told, probability


def test_the_regression_finds_the_law_it_was_drawn_from():
    x, told, probability = drawn()
    model = Logistic.fit(x, told, penalty=0)
    slopes = model.weights / model.scale
    assert float(slopes[0]) == pytest.approx(2, abs=0.25)
    assert float(slopes[1] * 5) == pytest.approx(-1, abs=0.15)
    assert float(slopes[2] * 100) == pytest.approx(0, abs=0.1)
    assert float((model.probability(x) - probability).abs().mean()) < 0.03


def test_it_stays_finite_where_nothing_is_in_doubt_and_where_nothing_differs():
    x, told = torch.tensor([[0.0, 1.0], [1.0, 1.0], [2.0, 1.0], [3.0, 1.0]]), torch.tensor([False, False, True, True])
    model = Logistic.fit(x, told)
    assert torch.isfinite(model.weights).all()
    assert (model.probability(x) > 0.5).tolist() == told.tolist()


def test_features_are_compared_on_questions_they_were_not_calibrated_on():
    x, told, _ = drawn()
    half = torch.arange(len(told)) % 2 == 0
    found = compare(x, ["up", "down", "noise"], told, half)
    assert found["features"]["up"]["high_means"] == "told"
    assert found["features"]["down"]["high_means"] == "not told"
    assert found["features"]["up"]["auroc"] == pytest.approx(auroc(x[~half & told][:, 0], x[~half & ~told][:, 0]))
    assert found["features"]["down"]["auroc"] > 0.6
    assert abs(found["features"]["noise"]["auroc"] - 0.5) < 0.05
    combined = found["combined"]
    assert combined["auroc"] > found["features"]["up"]["auroc"]
    assert combined["balanced_accuracy"] == (combined["answered"] + combined["abstention_accuracy"]) / 2
    assert combined["brier"] < 0.2
    assert found["judged_on"] == {"told": int(told[~half].sum()), "not_told": int((~told[~half]).sum())}
    # What is judged is not looked at before: other judged questions leave the calibration alone.
    other = compare(torch.cat([x[half], -x[~half]]), ["a", "b", "c"], torch.cat([told[half], told[~half]]),
                    torch.arange(len(told)) < half.sum())  # fmt: skip
    assert list(other["combined"]["weights"].values()) == list(combined["weights"].values())


def test_bad_features():
    x, told, _ = drawn(8)
    with pytest.raises(InputError, match="features must be finite"):
        Logistic.fit(x * float("inf"), told)
    with pytest.raises(InputError, match="a name for every feature, got 1 for 3"):
        compare(x, ["a"], told, told)
    with pytest.raises(InputError, match="one truth value per question"):
        threshold(x[:, 0], told.float())
