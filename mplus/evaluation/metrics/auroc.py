"""AUROC: how well a score tells two kinds of questions apart."""

from __future__ import annotations

import torch
from torch import Tensor

from mplus.errors import InputError


def auroc(positive: Tensor, negative: Tensor) -> float:
    """The chance that a positive has the higher score of a random pair; equal scores count one half. Exact.

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
