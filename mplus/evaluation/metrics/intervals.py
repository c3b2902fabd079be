"""Confidence intervals of accuracies."""

from __future__ import annotations

import math
from statistics import NormalDist

from mplus.errors import InputError


def wilson(correct: int, questions: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion; it stays honest near 0 and 1 and for few questions.

    Raises:
        InputError: no questions, more correct ones than there are, or a confidence outside (0, 1).
    """
    if questions < 1 or not 0 <= correct <= questions:
        raise InputError(
            f"an interval needs at least one question and 0 to that many correct ones, got {correct} of {questions}"
        )
    if not 0 < confidence < 1:
        raise InputError(f"confidence must lie between 0 and 1, got {confidence!r}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, weight = correct / questions, z * z / questions
    centre = share + weight / 2
    half = z * math.sqrt(share * (1 - share) / questions + weight / (4 * questions))
    # Exactly 0 and 1 at the ends, where rounding would leave something over.
    low = 0.0 if correct == 0 else max((centre - half) / (1 + weight), 0.0)
    high = 1.0 if correct == questions else min((centre + half) / (1 + weight), 1.0)
    return low, high
