"""Cell: what one arm answered at one age, and how sure that share is."""

from __future__ import annotations

import math
from statistics import NormalDist

from attrs import define, field

from mplus.config import whole
from mplus.errors import InputError


def wilson(correct: int, questions: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval of a proportion; it stays honest near 0 and 1 and for few questions.

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


@define(frozen=True, kw_only=True)
class Cell:
    """One arm at one age.

    Example:
        >>> cell = Cell(age=4, questions=20, correct=15)
        >>> cell.accuracy, [round(share, 2) for share in cell.interval]
        (0.75, [0.53, 0.89])

    Attributes:
        age: chunks written after the last one that the answer needs.
        questions, correct: how many were asked and answered right.
        state_bytes: the most bytes kept between telling and asking; None: not measured.
        tokens_attended: the most rows and tokens in sight of the first token of an answer; None: not measured.
        scores: means of further scores (``exact_match``, ``f1``), by name.
        recall: share of the questions of which all evidence was brought back; None: nothing is, or it was not noted.
        first_token_ms: median milliseconds until the first token of an answer, one question at a time; None: not timed.
        outcomes: id of each question -> whether it was answered right, to compare arms question by question.
    """

    age: int = field(validator=whole(0))
    questions: int = field(validator=whole(1))
    correct: int = field(validator=whole(0))
    state_bytes: int | None = None
    tokens_attended: int | None = None
    scores: dict[str, float] = field(factory=dict)
    recall: float | None = None
    first_token_ms: float | None = None
    outcomes: dict[str, bool] = field(factory=dict)

    def __attrs_post_init__(self) -> None:
        if self.correct > self.questions:
            raise InputError(f"correct must not exceed questions ({self.questions}), got {self.correct}")

    @property
    def accuracy(self) -> float:
        """Return the share of questions answered right."""
        return self.correct / self.questions

    @property
    def interval(self) -> tuple[float, float]:
        """Return the 95 % confidence interval of the accuracy (Wilson)."""
        return wilson(self.correct, self.questions)
