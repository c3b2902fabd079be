"""Abstention: signs of whether the answer is in memory, calibrated on some questions and judged on others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import define
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from mplus.config import JsonValue
from mplus.errors import InputError
from mplus.evaluation.execution.base import Execution, M, W


@torch.no_grad()
def abstention(execution: Execution[M, W], *, name: str | None = None) -> dict[str, JsonValue]:
    """Compare signs of whether an answer is in memory, on questions that were told and on some that were not.

    Of data sets, episodes with even numbers calibrate and the others are judged; of facts, other streams calibrate.

    Args:
        execution: of a decoder and a task; of a data set, with ``untold`` of at least 1.
        name: what the report calls the model.

    Returns:
        As ``mplus.evaluation.abstention.compare``: every sign by itself and all together. With
        ``said_unknown``, how often the decoder says so by itself, where it has a word for that.

    Raises:
        InputError: the task asks nothing that was not told, or makes one episode only.
        ConfigError: a setting that the execution would not follow.
    """
    found = list(execution.signals())
    features, told, calibrates = (
        torch.cat([getattr(part, column) for part in found]) for column in ("features", "told", "calibrates")
    )
    present = [column for column in range(features.shape[1]) if not bool(features[:, column].isnan().all())]
    report = compare(features[:, present], [execution.features[column] for column in present], told, calibrates)
    said = [part.said_unknown[~part.calibrates] for part in found if part.said_unknown is not None]
    if len(said) == len(found):  # how often the decoder says so of what was told, and of what was not
        said_unknown, told = torch.cat(said), told[~calibrates]
        report["said_unknown"] = {
            "of_told": float(said_unknown[told].float().mean()),
            "of_untold": float(said_unknown[~told].float().mean()),
        }
    return execution.plain("abstention", report, name)


def auroc(positive: Tensor, negative: Tensor) -> float:
    """Return the chance that a positive has the higher score of a random pair; equal scores count one half. Exact.

    Args:
        positive, negative: ``[n]`` and ``[m]`` scores, finite.

    Raises:
        InputError: one of them is empty, or a score is NaN or infinite.
    """
    positive, negative = positive.double().flatten(), negative.double().flatten()
    if not len(positive) or not len(negative):
        raise InputError(f"AUROC needs scores of both kinds, got {len(positive)} positive and {len(negative)} negative")
    scores = torch.cat([positive, negative])
    if not bool(scores.isfinite().all()):
        raise InputError("AUROC needs finite scores, some are NaN or infinite")
    # Ranks from 1 on; equal scores share the mean of theirs. All numbers are halves, so nothing is rounded.
    _, place, counts = scores.unique(sorted=True, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    ranks = (last - (counts - 1).double() / 2)[place]
    wins = ranks[: len(positive)].sum() - len(positive) * (len(positive) + 1) / 2
    return float(wins / (len(positive) * len(negative)))


@define(frozen=True, eq=False)
class Logistic:
    """A logistic regression: ``sigmoid(weights . (features - mean) / scale + bias)``, all float64.

    Attributes:
        mean, scale, weights: ``[f]``.
        bias: scalar.
    """

    mean: Tensor
    scale: Tensor
    weights: Tensor
    bias: Tensor

    @classmethod
    def fit(cls, features: Tensor, told: Tensor, penalty: float = 1e-3) -> Logistic:
        """Fit to ``[n, f]`` features of questions that were ``told`` (``[n]`` bool) or not; both kinds weigh the same.

        ``penalty``, on the squared weights, keeps them finite where the kinds can be told apart without a mistake.

        Raises:
            InputError: one kind is missing, or a feature is NaN or infinite.
        """
        _check(features, told)
        x, y = features.double(), told.double()
        mean, scale = x.mean(0), x.std(0, correction=0)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # a sign that never varies tells nothing
        x = (x - mean) / scale
        share = y.mean()
        # Each kind weighs one half, however many questions it has.
        weight = torch.where(told, 0.5 / share, 0.5 / (1 - share)) / len(y)
        weights = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
        bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
        solver = torch.optim.LBFGS(
            [weights, bias], max_iter=200, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            solver.zero_grad()
            value = binary_cross_entropy_with_logits(x @ weights + bias, y, weight=weight, reduction="sum")
            value = value + penalty * (weights**2).sum()
            value.backward()
            return value

        with torch.enable_grad():  # callers measure without gradients
            solver.step(loss)
        return cls(mean, scale, weights.detach(), bias.detach())

    def probability(self, features: Tensor) -> Tensor:
        """Return the probability ``[n]`` float64 that the answer was told, where as many were as were not."""
        return (((features.double() - self.mean) / self.scale) @ self.weights + self.bias).sigmoid()


def threshold(scores: Tensor, told: Tensor) -> float:
    """Find the score from which on to answer: the best mean of "answers what was told" and "abstains from the rest".

    It lies halfway between two scores; of several that are equally good the lowest is taken.
    """
    _check(scores[:, None], told)
    steps = scores.double().unique(sorted=True)
    # The outermost two answer everything and nothing.
    cuts = torch.cat([steps[:1] - 1, (steps[:-1] + steps[1:]) / 2, steps[-1:] + 1])
    right = []
    for cut in cuts:
        answers = scores.double() >= float(cut)
        right.append((float(answers[told].double().mean()) + float((~answers[~told]).double().mean())) / 2)
    return float(cuts[right.index(max(right))])


@define(frozen=True, kw_only=True)
class Abstention:
    """The quality of a score that decides to answer or to abstain, on questions it was not calibrated on.

    Attributes:
        auroc: of the score.
        threshold: from which on the memory answers.
        answered: share of questions about told facts that are answered.
        abstained: share of questions about facts never told that are not (abstention accuracy).
        brier: mean squared error of the score as a probability; None where it is none.
    """

    auroc: float
    threshold: float
    answered: float
    abstained: float
    brier: float | None = None

    @property
    def accuracy(self) -> float:
        """Return the mean of ``answered`` and ``abstained``."""
        return (self.answered + self.abstained) / 2


def judge(scores: Tensor, told: Tensor, at: float, *, probability: bool = False) -> Abstention:
    """Judge ``[n]`` scores against what was ``told`` (``[n]`` bool), answering from ``at`` on."""
    _check(scores[:, None], told)
    scores = scores.double()
    return Abstention(
        auroc=auroc(scores[told], scores[~told]),
        threshold=at,
        answered=float((scores[told] >= at).double().mean()),
        abstained=float((scores[~told] < at).double().mean()),
        brier=float((scores - told.double()).square().mean()) if probability else None,
    )


def compare(features: Tensor, names: Sequence[str], told: Tensor, calibrate: Tensor) -> dict[str, JsonValue]:
    """Judge every feature by itself and all of them together.

    Args:
        features: ``[n, f]``, one column per name.
        names: of the columns.
        told: ``[n]`` bool.
        calibrate: ``[n]`` bool: questions to calibrate on (direction, threshold, regression); the others are judged.
            Both parts must have questions of both kinds, best of different episodes.

    Returns:
        Plain data: ``features`` name -> figures, ``combined`` figures with the weights, and the counts.
    """
    if features.shape[1] != len(names):
        raise InputError(f"there must be a name for every feature, got {len(names)} for {features.shape[1]}")
    judged: dict[str, JsonValue] = {}
    for column, name in enumerate(names):
        scores = features[:, column].double()
        known, truth = scores[calibrate], told[calibrate]
        _check(known[:, None], truth)
        # High where nothing was told (an entropy, say): turned round, by what calibration shows.
        sign = 1.0 if auroc(known[truth], known[~truth]) >= 0.5 else -1.0
        result = judge(sign * scores[~calibrate], told[~calibrate], threshold(sign * known, truth))
        judged[name] = {**_figures(result), "high_means": "told" if sign > 0 else "not told"}
    model = Logistic.fit(features[calibrate], told[calibrate])
    at = threshold(model.probability(features[calibrate]), told[calibrate])
    combined = judge(model.probability(features[~calibrate]), told[~calibrate], at, probability=True)
    return {
        "features": judged,
        "combined": {
            **_figures(combined),
            "weights": {name: round(float(w), 4) for name, w in zip(names, model.weights, strict=True)},
        },
        "calibrated_on": {"told": int(told[calibrate].sum()), "not_told": int((~told[calibrate]).sum())},
        "judged_on": {"told": int(told[~calibrate].sum()), "not_told": int((~told[~calibrate]).sum())},
    }


def _figures(result: Abstention) -> dict[str, JsonValue]:
    figures: dict[str, JsonValue] = {
        "auroc": result.auroc,
        "abstention_accuracy": result.abstained,
        "answered": result.answered,
        "balanced_accuracy": result.accuracy,
        "threshold": result.threshold,
    }
    return figures if result.brier is None else {**figures, "brier": result.brier}


def _check(features: Tensor, told: Tensor) -> None:
    if told.dtype != torch.bool or len(told) != len(features):
        raise InputError(f"told must be one truth value per question, got {told.dtype} {list(told.shape)}")
    if not bool(told.any()) or bool(told.all()):
        raise InputError(
            f"there must be questions about what was told and about what was not, got {int(told.sum())} of {len(told)}"
        )
    if not bool(features.isfinite().all()):
        raise InputError("features must be finite, some are NaN or infinite")
