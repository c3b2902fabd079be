"""Choosing long-term rows of dense streams."""

from __future__ import annotations

from typing import Protocol

from attrs import define
from torch import Tensor

from mplus.mechanisms.short_term.long_term_rows import LongTermRows
from mplus.retrievers.base import Retriever


class RowSelector(Protocol):
    """Chooses long-term rows for every text of every stream."""

    def select(
        self, layer: int, text: Tensor, queries: Tensor, rows: Tensor, ltm: LongTermRows, count: int
    ) -> tuple[Tensor, Tensor]:
        """Places ``[B, R, count]`` int64 in the long-term rows, in any order, and their scores.

        Args:
            layer: index among the layers that carry memory.
            text: ``[B, R, T, d]`` after the layer's input norm.
            queries: ``[B, R, T]`` bool, the tokens to choose by.
            rows: ``[B, m, d]`` long-term rows after the input norm.
            ltm: the same rows with source and birth.
            count: how many, at most m.
        """


@define(frozen=True, eq=False)
class ScoreSelector:
    """The rows a retriever scores best, with keys made anew by its present weights."""

    retriever: Retriever

    def select(
        self, layer: int, text: Tensor, queries: Tensor, rows: Tensor, ltm: LongTermRows, count: int
    ) -> tuple[Tensor, Tensor]:
        best = self.score(layer, text, queries, rows).topk(count, dim=2)
        return best.indices, best.values

    def score(self, layer: int, text: Tensor, queries: Tensor, rows: Tensor) -> Tensor:
        """``[B, R, m]``: the score of every row for every text."""
        batch, each, tokens, size = text.shape
        keys = self.retriever.project_keys(layer, rows.flatten(0, 1)).view(*rows.shape[:2], -1)  # type: ignore[union-attr]
        projected = self.retriever.project_queries(layer, text.reshape(batch * each, tokens, size))
        return self.retriever.score(layer, projected.view(batch, each, tokens, -1), queries, keys)
