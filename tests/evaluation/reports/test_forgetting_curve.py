"""The forgetting laws by hand, and against a memory that forgets."""

from __future__ import annotations

import pytest
import torch

from mplus.errors import InputError
from mplus.evaluation.reports.forgetting_curve import any_row, curves, one_row


def test_by_hand():
    assert one_row(0, 4, 32) == 1
    assert one_row(2, 4, 32) == 0.875**2
    assert any_row(8, 4, 32) == pytest.approx(1 - (1 - 0.875**8) ** 4)
    assert [round(any_row(age, 4, 32), 2) for age in (1, 4, 8, 12, 16, 24)] == [1.0, 0.97, 0.81, 0.59, 0.4, 0.15]
    assert any_row(8, 4, 32, carriers=1) == one_row(8, 4, 32)
    assert any_row(3, 5, 5) == 0


def test_the_law_of_one_row_is_that_of_a_simulated_memory():
    generator = torch.Generator().manual_seed(0)
    alive = torch.zeros(9)
    for _ in range(400):
        written = torch.zeros(32, dtype=torch.int64) - 1  # a full memory
        written = torch.cat([written[4:], torch.zeros(4, dtype=torch.int64)])
        for age in range(9):
            alive[age] += int((written == 0).sum())
            stay = torch.randperm(32, generator=generator)[:28]
            written = torch.cat([written[stay], torch.full((4,), age + 1)])
    expected = torch.tensor([one_row(age, 4, 32) for age in range(9)])
    assert (alive / 1600 - expected).abs().max() < 0.04


def test_curves_say_their_formula():
    best, worst = curves([0, 8], 4, 32, chance=1 / 32)
    assert best.accuracy_by_age == {0: 1.0, 8: pytest.approx(1 / 32 + any_row(8, 4, 32) * 31 / 32)}
    assert worst.accuracy_by_age[8] == pytest.approx(1 / 32 + one_row(8, 4, 32) * 31 / 32)
    known = curves([0, 2], 4, 32, chance=0.25, ceiling=0.75)[1].accuracy_by_age
    assert known == {0: 0.75, 2: pytest.approx(0.25 + 0.875**2 * 0.5)}
    assert best.formula == "1-(1-(1-4/32)^n)^4 + chance 0.0312"
    assert worst.formula == "(1-4/32)^n + chance 0.0312"
    assert curves([1], 4, 32)[1].formula == "(1-4/32)^n"


@pytest.mark.parametrize(("age", "new", "stm"), [(-1, 4, 32), (1, 0, 32), (1, 33, 32)])
def test_impossible_sizes(age, new, stm):
    with pytest.raises(InputError, match=f"new_rows={new}, short_term={stm}, age={age}"):
        one_row(age, new, stm)


def test_impossible_carriers():
    with pytest.raises(InputError, match="carriers must be at least 1, got 0"):
        any_row(1, 4, 32, carriers=0)
