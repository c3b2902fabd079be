"""Retriever health: does it bring back what a question needs, and does that decide the answer?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Generic

import torch
from attrs import define, field
from torch import Tensor

from mplus.config import JsonValue
from mplus.errors import ConfigError
from mplus.evaluation.execution.ann_recall import Shortcuts
from mplus.evaluation.execution.base import Execution, M, RowCounts, Trace, W
from mplus.retrievers.base import Retriever


@torch.no_grad()
def retriever_health(
    execution: Execution[M, W],
    *,
    retrieved_tokens: Sequence[int] | None = None,
    retrievers: Mapping[str, Retriever] | None = None,
    name: str | None = None,
) -> dict[str, JsonValue]:
    """Measure gold recall per layer, P(any useful row), and accuracy with a hit and without, at several K0.

    Beside them, on the queries of the decoder's own reads: the share of the exact best rows that each retriever finds,
    and how long it takes.

    Args:
        execution: of a decoder and a task; only told questions are asked. Ages at which the fact has left the STM, of
            a memory that has one, tell most.
        retrieved_tokens: the K0 to try; None: a quarter to four times that of the config.
        retrievers: read in place of the decoder's own, which is the first in any case; None: those of the execution.
        name: what the report calls the model.

    Raises:
        NotSupported: reads of the decoder's mechanism bring no rows back, or ``retrievers`` should stand in for one
            that it does not have.
        ConfigError: a K0 below 1, or a setting that the execution would not follow.
    """
    read_with = execution.retriever_ways(retrievers)
    configured = execution.model.mplus_config.retrieved_tokens
    usual = [] if configured is None else [configured * factor // 4 for factor in (1, 2, 4, 8, 16)]
    tried = sorted({k for k in usual if k > 0} if retrieved_tokens is None else set(retrieved_tokens))
    if not tried or tried[0] < 1:
        raise ConfigError(f"retrieved_tokens must be numbers of at least 1, got {tried}")
    layers = execution.model.mplus_engine.layout.layers
    comparison = _Comparison(execution, read_with, tried, layers)
    for moment in execution.moments():
        comparison.add(moment)
    return execution.plain("retriever", {"trained_with": configured, **comparison.plain()}, name)


class _Comparison(Generic[M, W]):
    """Several retrievers, each read with at every K0 tried."""

    def __init__(
        self,
        execution: Execution[M, W],
        read_with: Mapping[str, Retriever | None],
        tried: Sequence[int],
        layers: int,
    ) -> None:
        self.execution, self.tried = execution, tried
        searching = {name: retriever for name, retriever in read_with.items() if retriever is not None}
        own = searching.get(execution.own_retriever)
        self.counts = {(name, k): HitCount(layers) for name in read_with for k in tried}
        self.shortcuts = {} if own is None else {k: Shortcuts(own, searching, k, layers) for k in tried}
        self.spreads: list[list[float]] = [[] for _ in range(layers)]

    def add(self, moment: M) -> None:
        """Read with every retriever at every K0."""
        execution, own = self.execution, self.execution.own_retriever
        told = [one for one in moment.due if one.question.told]
        spread_k = execution.spread_tokens(self.tried)
        for (name, k), count in self.counts.items():
            spread = name == own and k == spread_k
            trace = execution.traced(moment, told, name, k, self.shortcuts.get(k) if name == own else None, spread)
            count.add(trace)
            self._add_spread(trace)
        if spread_k not in self.tried:
            self._add_spread(execution.traced(moment, told, own, spread_k, None, True))

    def _add_spread(self, trace: Trace) -> None:
        for layer, values in enumerate(trace.spread):
            self.spreads[layer] += values

    def plain(self) -> dict[str, JsonValue]:
        """Return the rows that each retriever found at each K0, and how far the scores of the own one lie apart."""
        names = dict.fromkeys(name for name, _ in self.counts)
        compared: dict[tuple[str, int], dict[str, JsonValue]] = {
            (name, k): facts for k, one in self.shortcuts.items() for name, facts in one.plain().items()
        }
        return {
            "score_std_by_layer": [_share(sum(values), len(values)) for values in self.spreads],
            "by_retrieved_tokens": {
                str(k): {
                    name: {
                        **self.counts[name, k].plain(self.execution.accuracy_digits),
                        **compared.get((name, k), {}),
                    }
                    for name in names
                }
                for k in self.tried
            },
        }


@define(eq=False)
class HitCount:
    """Sums over questions, for one retriever and one K0; tensors have one entry per layer.

    Attributes:
        useful, found: rows in the LTM that the answer is in, and those of them that came back.
        possible, any_found: questions with such a row in the LTM, and with one retrieved.
        stored, retrieved: all rows, where they are counted.
        asked, right: questions.
        by_hit: of questions with no useful row left in any STM: [without a hit, with one], each [right, asked].
    """

    layers: int
    useful: Tensor = field(init=False)
    found: Tensor = field(init=False)
    possible: Tensor = field(init=False)
    any_found: Tensor = field(init=False)
    stored: Tensor = field(init=False)
    retrieved: Tensor = field(init=False)
    by_hit: Tensor = field(factory=lambda: torch.zeros(2, 2, dtype=torch.int64))
    asked: int = 0
    right: int = 0

    def __attrs_post_init__(self) -> None:
        for name in ("useful", "found", "possible", "any_found", "stored", "retrieved"):
            setattr(self, name, torch.zeros(self.layers, dtype=torch.int64))

    def add(self, trace: Trace) -> None:
        """Count the questions of one trace."""
        if not len(trace.correct):
            return
        for layer, rows in enumerate(trace.layers):
            self._add_layer(layer, rows)
        hit = torch.stack([rows.useful_retrieved for rows in trace.layers]).sum(0) > 0
        # Nothing of the answer is left in any STM, so only retrieval can answer.
        alone = torch.stack([rows.useful_short_term for rows in trace.layers]).sum(0) == 0
        self.asked += len(trace.correct)
        self.right += int(trace.correct.sum())
        for got in (0, 1):
            chosen = alone & (hit == bool(got))
            self.by_hit[got] += torch.stack([trace.correct[chosen].sum(), chosen.sum()])

    def _add_layer(self, layer: int, rows: RowCounts) -> None:
        self.useful[layer] += rows.useful.sum()
        self.found[layer] += rows.useful_retrieved.sum()
        self.possible[layer] += (rows.useful > 0).sum()
        self.any_found[layer] += (rows.useful_retrieved > 0).sum()
        if rows.stored is not None and rows.retrieved is not None:
            self.stored[layer] += rows.stored.sum()
            self.retrieved[layer] += rows.retrieved.sum()

    def plain(self, accuracy_digits: int | None = 4) -> dict[str, JsonValue]:
        """Return shares; None where nothing was counted. Accuracy is in full where ``accuracy_digits`` is None."""
        without, with_hit = self.by_hit.tolist()
        accuracy = self.right / self.asked if self.asked else None
        if accuracy is not None and accuracy_digits is not None:
            accuracy = round(accuracy, accuracy_digits)
        counted = bool(self.stored.any())
        return {
            "questions": self.asked,
            "accuracy": accuracy,
            "gold_recall_by_layer": _shares(self.found, self.useful),
            **({"share_of_rows_retrieved_by_layer": _shares(self.retrieved, self.stored)} if counted else {}),
            "any_useful_row_by_layer": _shares(self.any_found, self.possible),
            "accuracy_with_hit": _share(*with_hit),
            "accuracy_without_hit": _share(*without),
            "questions_with_hit": with_hit[1],
            "questions_without_hit": without[1],
        }


def _shares(parts: Tensor, wholes: Tensor) -> list[float | None]:
    return [_share(part, whole) for part, whole in zip(parts.tolist(), wholes.tolist(), strict=True)]


def _share(part: float, whole: float) -> float | None:
    return round(part / whole, 4) if whole else None
