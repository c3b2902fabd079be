"""Rank turns: how relevant they are, and how recent."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import define
from torch import Tensor


@define(frozen=True)
class Ranked:
    """A turn that was ranked.

    Attributes:
        turn: its number in the stream, from 0 on.
        score: recency and relevance together.
    """

    turn: int
    score: float


def rank(
    relevance: Tensor, times: Sequence[float], now: float, *, decay: float = 0.995, recency: float = 1.0, k: int = 6
) -> list[Ranked]:
    """Return the best turns, best first, the earlier one among equals.

    The paper adds recency to relevance; nothing that could be read says how recency is computed. Ours is
    ``decay ** (now - time)``; the released code has none (``recency = 0``).

    Args:
        relevance: ``[n]``, of every turn but the last, which is flash memory.
        times: of each of them.
        now: the time of the question.
        decay: of recency in one unit of time.
        recency: its weight.
        k: turns at most.
    """
    age = torch.tensor([now - time for time in times], dtype=torch.float64)
    scores = relevance.double() + recency * decay**age
    order = scores.argsort(descending=True, stable=True)[:k]
    return [Ranked(turn, float(scores[turn])) for turn in order.tolist()]


def cosines(query: Tensor, vectors: Tensor) -> Tensor:
    """Return ``[n]`` float64, the cosine of a query ``[w]`` with each of ``vectors`` ``[n, w]``; of zeros it is 0."""
    query, vectors = query.double(), vectors.double()
    lengths = query.norm() * vectors.norm(dim=-1)
    found: Tensor = (vectors @ query) / lengths.clamp(min=1e-12)
    return found
