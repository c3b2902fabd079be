"""The order of the best chunks: how well their tokens match those of the question, and which of them are newer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import define
from torch import Tensor

from mplus.mechanisms.decoder import Decoder
from mplus.mechanisms.kv.asked import Asked, ChosenChunks, Question
from mplus.mechanisms.kv.front import Front, rows_of
from mplus.mechanisms.kv.late_interaction import LateInteraction, matches_among
from mplus.mechanisms.kv.passes import padded, run_behind, values_in

MATCH = 2.0
"""What late interaction counts for, beside the scores of "hybrid"; both are in units of scores of unrelated texts."""
NATS = 0.5
"""What a nat of the question's likelihood behind a chunk counts for, in the same unit."""
ALIKE = 0.7
"""Chunks whose tokens match each other so well say the same of the same thing, with another value perhaps."""
SAME = 6.0
"""The newer of such chunks is preferred where their weights differ by no more."""
LIKELY = 3.0
"""Where the likelihood is known, a newer chunk is preferred whose weight is lower by no more,"""
LESS_LIKELY = 1.5
"""and behind which no token of the question is less likely by more nats."""


@define(frozen=True, eq=False)
class Ranking:
    """The order of some chunks.

    Attributes:
        weights: ``[k]`` float64, the best one has the highest.
        near: ``[k]`` bool, the best one, and those that say as much: of these the newest is preferred.
    """

    weights: Tensor
    near: Tensor


def ranked(
    decoder: Decoder,
    several: Sequence[tuple[Asked, Sequence[Question], ChosenChunks]],
    near: float,
    likelihood: bool,
) -> list[Ranking]:
    """Return the order of the chunks of each row, by their scores and late interaction, and by likelihood if wanted.

    Args:
        decoder: for likelihood, runs one batched pass over the questions, each behind each of its chunks.
        several: of each row what it asks, the forms of its question, and chunks with their scores.
        near: weights that differ by no more are near-equal.
        likelihood: of the question behind each chunk counts too.
    """
    likely = likelihoods(decoder, [(asked, found.chunks) for asked, _, found in several]) if likelihood else []
    rankings = []
    for row, (asked, questions, found) in enumerate(several):
        matched, alike = _matched(decoder, asked, questions, found.chunks)
        weights = found.scores + MATCH * matched + (NATS * likely[row].sum(1) if likelihood else 0)
        best, below = weights.argmax(), weights.max() - weights
        same = (below <= near) | ((below <= SAME) & (alike[best] >= ALIKE))
        if likelihood:
            same = (likely[row][best] - likely[row] <= LESS_LIKELY).all(1) & (same | (below <= LIKELY))
        rankings.append(Ranking(weights, same))
    return rankings


def likelihoods(decoder: Decoder, asked: Sequence[tuple[Asked, Tensor]]) -> list[Tensor]:
    """Return log-likelihoods of the tokens of each row's question behind each of its chunks, ``[k, q - 1]`` float64.

    That of the first token is left out: the decoder has not read yet that the chunk is over.
    """
    if not asked:
        return []
    pairs = [(one, chunk) for one, chunks in asked for chunk in chunks.split(1)]
    ids, mask = padded([one.question for one, _ in pairs])
    front = Front.before_text(
        decoder.kept,
        [one.view for one, _ in pairs],
        [one.state.places(chunk) for one, chunk in pairs],
        [one.begin for one, _ in pairs],
    )
    logits = run_behind(decoder, front, ids, mask=mask, collect={"logits"}).need_logits()
    nats = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None].to(logits.device)).squeeze(-1)
    nats = (nats * mask[:, 1:].to(nats.device)).double().cpu()
    return list(nats.split([len(chunks) for _, chunks in asked]))


def _matched(decoder: Decoder, asked: Asked, questions: Sequence[Question], chunks: Tensor) -> tuple[Tensor, Tensor]:
    """Return how well chunks match the question, ``[k]`` float64, and each other, ``[k, k]``; 0 if it is not known how.

    A question that ends in an instruction counts with or without it, whichever a chunk matches better.
    """
    forms = [question.values for question in questions if question.values is not None]
    if not forms:
        return torch.zeros(len(chunks), dtype=torch.float64), torch.zeros(len(chunks), len(chunks))
    state = asked.state
    late, places, lengths = LateInteraction.from_flat(state.late_interaction), state.places(chunks), state.chunk_length
    rows = torch.stack([rows_of(asked.view, layer, places) for layer in late.layers.tolist()])
    values, own = values_in(decoder.kept, rows), lengths[chunks]
    matches, alike = matches_among([form.to(values.device) for form in forms], values, own)
    return late.scores(matches).amax(0), ((alike + alike.T) / 2).cpu()
