"""How often each retriever finds the right passage of pairs whose mean hidden states are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from attrs import asdict, define
from torch import Tensor

from mplus.config import JsonValue
from mplus.evaluation.reports.paired import difference
from mplus.retrievers.chunks.base import ChunkRetriever, Chunks, Query
from mplus.training.chunk_retriever.fitting import PooledPairs
from mplus.training.chunk_retriever.pairs import Pairs

if TYPE_CHECKING:
    from mplus.hf.types import PreTrainedTokenizerBase

DEPTHS = (1, 4)
"""Among so many of the best the right one is looked for."""
BASE = "hybrid"
"""The retriever that others are compared with."""


@define(frozen=True, eq=False)
class _PooledDecoder:
    """Gives the mean hidden states of questions for those of their only token, so that their mean is the same."""

    weights: str
    means: Tensor

    def hidden_states(self, ids: Tensor, mask: Tensor) -> Sequence[Tensor]:
        return tuple(self.means[:, layer : layer + 1] for layer in range(self.means.shape[1]))


def compare(
    retrievers: Mapping[str, ChunkRetriever],
    calibrations: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    pairs: Pairs,
    pooled: PooledPairs,
) -> dict[str, JsonValue]:
    """Return recall at 1 and 4 by retriever, with the difference to "hybrid" and its 95 % interval where that is one.

    Args:
        retrievers: by name.
        calibrations: of each, as ``calibrate`` returns it.
        tokenizer: of the decoder.
        pairs: passages, among which the right one is to be found for each query.
        pooled: their mean hidden states.
    """
    found = {
        name: hits(retriever, calibrations[name], tokenizer, pairs, pooled) for name, retriever in retrievers.items()
    }
    report: dict[str, JsonValue] = {"passages": len(pairs.passages), "queries": len(pairs)}
    for name, own in found.items():
        one: dict[str, JsonValue] = {
            f"recall_at_{depth}": round(sum(right.values()) / len(right), 4) for depth, right in own.items()
        }
        if BASE in found and name != BASE:
            for depth, right in own.items():
                estimate = difference(right, found[BASE][depth])
                one[f"over_hybrid_at_{depth}"] = {key: round(value, 4) for key, value in asdict(estimate).items()}
        report[name] = one
    return report


def hits(
    retriever: ChunkRetriever,
    calibration: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Pairs,
    pooled: PooledPairs,
) -> dict[int, dict[str, bool]]:
    """Return for each depth, query by query, whether the right passage is among that many of the best."""
    lengths = torch.tensor([len(one) for one in pairs.passages])
    ids = torch.cat([torch.as_tensor(one) for one in pairs.passages]).int()
    states = _PooledDecoder("", pooled.passages.float()).hidden_states(ids, ids)
    one_each = torch.zeros(len(lengths), 1, dtype=torch.int64)
    keys = retriever.chunk_keys(one_each, states if retriever.collect else (), calibration, tokenizer)
    chunks = Chunks(lengths, ids, keys, calibration, tokenizer)
    asked = torch.zeros(len(pairs), 1, dtype=torch.int64)
    decoder = _PooledDecoder("", pooled.queries.float())
    query_keys = retriever.query_keys(asked, asked == 0, decoder, calibration, tokenizer)
    found: dict[int, dict[str, bool]] = {depth: {} for depth in DEPTHS}
    for place, (query, key, right) in enumerate(zip(pairs.queries, query_keys, pairs.right, strict=True)):
        scores = retriever.scores(Query(torch.as_tensor(query), key), chunks)
        rank = int((scores > scores[right]).sum())
        for depth in DEPTHS:
            found[depth][str(place)] = rank < depth
    return found
