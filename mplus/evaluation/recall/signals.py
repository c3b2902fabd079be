"""Knowing what is not there: signs, for each question, of whether its fact is in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from attrs import define
from torch import Tensor

from mplus.evaluation.recall.facts import Round, Telling, rounds, untold_round
from mplus.evaluation.recall.retention import tell
from mplus.facts import words
from mplus.training.batched.read import DenseDecoder
from mplus.training.batched.selection import ScorePicker
from mplus.training.batched.stream_batch import StreamBatch

FEATURES = ("unknown_logit", "entropy", "confidence", "best_score", "score_margin")
"""What is looked at, in the order of the columns:

- ``unknown_logit``: log-odds of the word "unknown" as the answer's first token;
- ``entropy``: of the answer's first token without the word "unknown", in nats;
- ``confidence``: probability of its best value, "unknown" left out;
- ``best_score``: the retriever's best score of any row, short-term rows included, mean over layers;
- ``score_margin``: the same, less the mean of all scores, in their standard deviations.
"""


@define(frozen=True, eq=False)
class Signs:
    """Signs of some questions.

    Attributes:
        features: ``[n, len(FEATURES)]`` float32.
        told: ``[n]`` bool, the fact was told.
        right: ``[n]`` bool, the first token of the answer, "unknown" left out, is right; False where untold.
        said_unknown: ``[n]`` bool, "unknown" is the most probable answer.
    """

    features: Tensor
    told: Tensor
    right: Tensor
    said_unknown: Tensor


@torch.no_grad()
def signs(model: Any, telling: Telling, *, long_term_tokens: int | None = None, seed: int = 1) -> Signs:
    """Ask about told facts at every age of ``telling``, and about as many that were never told."""
    episodes, decoder = telling.episodes(), DenseDecoder(model)
    tellings = tell(model, telling, episodes, long_term_tokens)
    found = []
    for number, asked in enumerate(rounds(telling, episodes)):
        streams = tellings.up_to(asked.told)
        untold = untold_round(telling, episodes, asked.told, len(telling.ages), seed * 1_000_003 + number)
        found += [_signs(decoder, streams, telling, one, told) for one, told in ((asked, True), (untold, False))]
    return Signs(*(torch.cat([getattr(part, name) for part in found]) for name in Signs.__annotations__))


def _signs(decoder: DenseDecoder, streams: StreamBatch, telling: Telling, asked: Round, told: bool) -> Signs:
    retriever = decoder.engine.mechanism.additions.retriever
    picker = ScorePicker(retriever) if retriever is not None else None
    read = decoder.read(streams, asked.texts, queries=asked.queries, picker=picker, candidates=_all_rows)
    first = read.logits[:, :, 3].float()
    unknown = telling.language.ids[words.UNKNOWN]
    probability = first.softmax(-1)[:, :, unknown].clamp(1e-7, 1 - 1e-7)
    others = first.clone()
    others[:, :, unknown] = -torch.inf
    shares = others.softmax(-1)
    columns = [
        probability.logit(),
        -(shares * shares.clamp(min=1e-30).log()).sum(-1),
        shares.max(-1).values,
        *_scores(picker, read.layers, asked.queries),
    ]
    right = (others.argmax(-1) == asked.texts[:, :, 4]) & told
    return Signs(
        torch.stack([column.flatten() for column in columns], 1),
        torch.full((right.numel(),), told),
        right.flatten(),
        (first.argmax(-1) == unknown).flatten(),
    )


def _all_rows(layer: int, sources: Tensor) -> Tensor:
    return torch.arange(sources.shape[1], device=sources.device).expand(sources.shape[0], -1)


def _scores(picker: ScorePicker | None, layers: Any, queries: Tensor) -> Sequence[Tensor]:
    """Best score and margin ``[B, A]``, mean over layers; zeros without a retriever."""
    best, margin = [], []
    for layer, seen in layers.items():
        if picker is None:
            continue
        scores = picker.score(layer, seen.text, queries, seen.candidates).float()
        top = scores.max(2).values
        best.append(top)
        margin.append((top - scores.mean(2)) / scores.std(2).clamp(min=1e-6))
    if not best:
        zero = torch.zeros(queries.shape[:2])
        return zero, zero
    return torch.stack(best).mean(0), torch.stack(margin).mean(0)
