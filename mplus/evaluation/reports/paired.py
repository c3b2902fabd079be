"""Comparison of arms question by question, with intervals from resampling the questions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from attrs import define
from torch import Tensor

from mplus.errors import InputError
from mplus.evaluation.reports.report import Arm

DRAWS = 4000
"""Samples of the questions, drawn with replacement."""


@define(frozen=True)
class Estimate:
    """A number with its 95 % interval.

    Attributes:
        value: of the questions as they are.
        low, high: between which it lies in 95 % of the samples.
    """

    value: float
    low: float
    high: float


def outcomes(arm: Arm) -> dict[str, bool]:
    """Return for each question of all ages whether an arm answered it right."""
    return {id_: right for cell in arm.cells for id_, right in cell.outcomes.items()}


def difference(one: Mapping[str, bool], other: Mapping[str, bool], seed: int = 0) -> Estimate:
    """Return the share that ``one`` has right less that of ``other``, of the questions that both were asked.

    Example:
        >>> difference({"a": True, "b": True}, {"a": True, "b": False}).value
        0.5

    Args:
        one, other: question -> whether it was answered right.
        seed: of the samples.

    Raises:
        InputError: they have no question in common.
    """
    mine, theirs = _paired(one, other)
    drawn = _drawn(mine.shape[0], seed)  # the same questions of both, so that what both find hard cancels
    return _estimate(mine.mean() - theirs.mean(), mine[drawn].mean(1) - theirs[drawn].mean(1))


def ratio(one: Mapping[str, bool], other: Mapping[str, bool], seed: int = 0) -> Estimate | None:
    """Return what ``one`` has right over what ``other`` has, of the questions that both were asked.

    Samples in which ``other`` has nothing right count as infinitely good ones.

    Returns:
        None where ``other`` has nothing right, so that there is no ratio.

    Raises:
        InputError: they have no question in common.
    """
    mine, theirs = _paired(one, other)
    if not bool(theirs.any()):
        return None
    drawn = _drawn(mine.shape[0], seed)
    return _estimate(mine.sum() / theirs.sum(), mine[drawn].sum(1) / theirs[drawn].sum(1))


def _paired(one: Mapping[str, bool], other: Mapping[str, bool]) -> tuple[Tensor, Tensor]:
    both = [id_ for id_ in one if id_ in other]
    if not both:
        raise InputError("arms compared question by question must have a question in common, these have none")
    return tuple(torch.tensor([float(some[id_]) for id_ in both], dtype=torch.float64) for some in (one, other))  # type: ignore[return-value]


def _drawn(questions: int, seed: int) -> Tensor:
    return torch.randint(questions, (DRAWS, questions), generator=torch.Generator().manual_seed(seed))


def _estimate(value: Tensor, samples: Tensor) -> Estimate:
    ordered = samples.nan_to_num(nan=float("inf"), posinf=float("inf")).sort().values  # 0 of 0, too
    low, high = (float(ordered[round(share * (len(ordered) - 1))]) for share in (0.025, 0.975))
    return Estimate(float(value), low, high)
