"""Findings about answers beyond their number: by category, and whether they show that something was never told."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mplus.config import JsonValue
from mplus.evaluation.abstention import auroc
from mplus.evaluation.execution.base import Answer, Due

Answered = Sequence[tuple[Due, Answer]]


def by_category(answered: Answered) -> dict[str, JsonValue]:
    """Return under ``by_category`` counts and scores of the questions of each; nothing where there are no categories.

    Of each category: ``questions``, ``correct`` (the answer holds an accepted one), ``f1`` (words, as SQuAD defines
    it) and, where something is brought back, ``recall`` (of all that the answer needs).
    """
    found: dict[str, list[tuple[Due, Answer]]] = {}
    for due, answer in answered:
        if due.question.category is not None:
            found.setdefault(due.question.category, []).append((due, answer))
    return {"by_category": {name: _category(some) for name, some in sorted(found.items())}} if found else {}


def _category(answered: Answered) -> dict[str, JsonValue]:
    count = len(answered)
    held = [answer.choice.holds(due.sources()) for due, answer in answered if answer.choice is not None]
    facts: dict[str, JsonValue] = {
        "questions": count,
        "correct": sum(answer.correct for _, answer in answered),
        "f1": round(sum(answer.scores["f1"] for _, answer in answered) / count, 4),
    }
    return {**facts, "recall": round(sum(held) / len(held), 4)} if held else facts


def signs_of_told(told: Answered, untold: Answered) -> dict[str, JsonValue]:
    """Return under ``untold`` how well signs tell questions that were told from those that were not.

    - ``questions``: how many were not told;
    - ``auroc_of_likelihood``: of the mean log-probability of the answer's tokens;
    - ``auroc_of_score``: of the best score of a chunk that was brought back, lowest where none was;
    - ``nothing_brought_back``: share of the questions, of both kinds, for which no chunk passed the threshold.

    Nothing where there are no questions of both kinds.
    """
    if not told or not untold:
        return {}
    facts: dict[str, JsonValue] = {"questions": len(untold)}
    kinds = {"told": told, "untold": untold}
    likelihoods = [[one.generated.known_likelihood for _, one in some if one.generated] for some in kinds.values()]
    if all(likelihoods) and not any(one is None for some in likelihoods for one in some):
        facts["auroc_of_likelihood"] = round(auroc(*map(torch.tensor, likelihoods)), 4)
    choices = {kind: [answer.choice for _, answer in some if answer.choice] for kind, some in kinds.items()}
    if all(choices.values()):
        facts["nothing_brought_back"] = {
            kind: round(sum(not choice.sources for choice in some) / len(some), 4) for kind, some in choices.items()
        }
    scores = {kind: [choice.score for choice in some] for kind, some in choices.items()}
    known = [score for some in scores.values() for score in some if score is not None]
    if known and all(scores.values()):
        lowest = min(known) - 1  # of what found nothing: below every score
        columns = (torch.tensor([lowest if one is None else one for one in some]) for some in scores.values())
        facts["auroc_of_score"] = round(auroc(*columns), 4)
    return {"untold": facts}
