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

MATCH = 4.0
"""What late interaction counts for, beside the scores of "hybrid"; both are in units of scores of unrelated texts."""
NATS = 0.5
"""What a nat of the question's likelihood behind a chunk counts for, in the same unit."""
ALIKE = 0.7
"""Chunks whose tokens match each other so well say the same of the same thing, with another value perhaps."""
SAME = 6.0
"""The newer of such chunks is preferred where their weights differ by no more."""
CLOSE = 1.5
"""A chunk that was written later is preferred, too, whose match with the question is lower by no more than this, and
nearer to that of the best one than to the next lower one,"""
RELATED = 0.53
"""and whose tokens match those of the best one so well: it says another thing of the same, in other words perhaps."""
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
        contrary = answering(matched, best) & (alike[best] >= RELATED)
        same |= contrary & written_later(asked, found.chunks, found.chunks[best])
        if likelihood:
            same = (likely[row][best] - likely[row] <= LESS_LIKELY).all(1) & (same | (below <= LIKELY))
        rankings.append(Ranking(weights, same))
    return rankings


def answering(matched: Tensor, best: Tensor) -> Tensor:
    """Return for each of ``matched`` ``[k]`` whether it answers the question as the chunk at ``best`` does, bool.

    Of a fact that changed two chunks stand out from all others: the other one's match is about as good as that of the
    best, and the third is further away than they are from each other.
    """
    third = matched.sort(descending=True).values[2] if len(matched) > 2 else matched.new_tensor(-torch.inf)
    behind = matched[best] - matched
    return (behind <= CLOSE) & (matched > third) & (matched - third >= behind)


def written_later(asked: Asked, chunks: Tensor, best: Tensor) -> Tensor:
    """Return for each of ``chunks`` ``[k]`` whether it was written after the chunk ``best``, bool.

    By the times of their sources; where they have none, or no name, by the order of writing. Parts of one source are of
    the same time: a text does not correct itself. Streams of a training keep no record of sources, and no times.
    """
    sources, numbers = asked.view.state.sources, asked.state.chunk_source
    own, others = sources.get(int(numbers[best])), [sources.get(number) for number in numbers[chunks].tolist()]
    time, again = None if own is None else own.last_time, own is None or own.name is None
    times = [None if one is None else one.last_time for one in others]
    later = [time is None or other is None or other > time for other in times]
    return (chunks > best) & torch.where(numbers[chunks] == numbers[best], again, torch.tensor(later))


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
