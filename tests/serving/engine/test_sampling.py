"""Sampling: as a plain reference draws, and the same whoever else is answered."""

from __future__ import annotations

import math
import random
from collections import Counter

import torch

from mplus.serving.engine.answers.sampling import BEST, Choice, Draws, choose
from mplus.serving.messages import Sampling


def tokens(logits: torch.Tensor, *samplings: Sampling) -> list[int]:
    """The tokens that are chosen for rows of these logits."""
    choices = choose(logits, [Draws.of(sampling, row) for row, sampling in enumerate(samplings)])
    return [choice.id if choice is not None else -1 for choice in choices]


def test_draws_are_those_of_a_plain_inverse_of_the_distribution() -> None:
    logits = torch.randn(40, 300, generator=torch.Generator().manual_seed(0)) * 3
    for top_p in (1.0, 0.7, 0.05):
        samplings = [Sampling(temperature=0.8, top_p=top_p, seed=100) for _ in range(40)]
        for row, token in enumerate(tokens(logits, *samplings)):
            weights = [math.exp(float(value) / 0.8) for value in logits[row].double()]
            total = sum(weights)
            order = range(300) if top_p == 1 else sorted(range(300), key=lambda n: -weights[n])
            kept, mass = [], 0.0
            for n in order:
                if mass < top_p * total:
                    kept.append(n)
                    mass += weights[n]
            place, mass = random.Random(100 + row).random() * mass, 0.0
            for n in kept:
                mass += weights[n]
                if place < mass:
                    break
            assert token == n


def test_a_row_draws_the_same_whoever_else_is_there() -> None:
    logits = torch.randn(8, 2000, generator=torch.Generator().manual_seed(1))
    sampling = Sampling(temperature=1.0, top_p=0.999, seed=3)
    alone = tokens(logits[:1], sampling)
    among = tokens(logits, sampling, *[Sampling(temperature=n / 3, top_p=0.5, seed=n) for n in range(7)])
    assert alone[0] == among[0]
    assert BEST < 2000  # so that all were sorted


def test_frequencies_follow_the_probabilities() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -30.0]]).expand(3000, 4)
    found = Counter(tokens(logits, *[Sampling(temperature=1.0, seed=0) for _ in range(3000)]))
    for token, share in enumerate(logits[0].softmax(0).tolist()):
        assert abs(found[token] / 3000 - share) < 0.04
    assert not found[3]


def test_bad_numbers_and_greedy_rows() -> None:
    logits = torch.zeros(4, 5)
    logits[0, 3], logits[1, 2], logits[2] = 1, torch.nan, -torch.inf
    logits[3] = torch.tensor([-torch.inf, 1.0, -torch.inf, 0.0, -torch.inf])  # some tokens are forbidden
    greedy = Sampling(temperature=0.0)
    assert tokens(logits, greedy, greedy, Sampling(seed=1), Sampling(seed=1))[:3] == [3, -1, -1]
    assert tokens(logits, *[Sampling(seed=1)] * 4)[3] in (1, 3)


def test_logprobs_are_those_of_the_decoder() -> None:
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(2))
    draws = [Draws.of(Sampling(temperature=2.0, seed=1, logprobs=3), 0), Draws.of(Sampling(temperature=0.0), 0)]
    first, second = choose(logits, draws)
    assert first is not None
    assert first.logprobs is not None
    assert second == Choice(int(logits[1].argmax()))
    expected = logits[0].log_softmax(0)
    assert first.logprobs.chosen == float(expected[first.id])
    values, ids = expected.topk(3)
    assert list(first.logprobs.best) == list(zip(ids.tolist(), values.tolist(), strict=True))
