"""Choose the next token of every row: each row draws by itself, so that it answers the same whoever else is there."""

from __future__ import annotations

import random

import torch
from attrs import define, field
from torch import Tensor

from mplus.serving.messages import Sampling, TokenLogprobs

BEST = 1024
"""Of so many best tokens the smallest set of probability ``top_p`` is looked for first: sorting all takes longer."""


@define(eq=False)
class Draws:
    """The way in which one row chooses its tokens.

    Attributes:
        sampling: as it was asked for.
        random: the row's own draws.
    """

    sampling: Sampling
    random: random.Random

    @staticmethod
    def of(sampling: Sampling, row: int) -> Draws:
        """Return the draws of the answer number ``row`` to one prompt."""
        # As Python takes the absolute value of a seed, rows of a negative one could be the same.
        seed = None if sampling.seed is None else (sampling.seed + row) % 2**64
        return Draws(sampling, random.Random(seed))  # noqa: S311 - tokens, no secrets


@define(frozen=True)
class Choice:
    """The token that was chosen for one row, and its log-probabilities if they were asked for."""

    id: int
    logprobs: TokenLogprobs | None = field(default=None)


def choose(logits: Tensor, draws: list[Draws]) -> list[Choice | None]:
    """Return the next token of every row; None where its logits are not finite.

    Args:
        logits: ``[B, V]``.
        draws: of B rows. Each is advanced by one number where the row samples.
    """
    logits = logits.float().cpu()
    finite = logits.isfinite().any(1) & ~logits.isnan().any(1)
    chosen = logits.argmax(1)
    drawn = [row for row, one in enumerate(draws) if one.sampling.temperature > 0 and bool(finite[row])]
    if drawn:
        chosen[drawn] = _drawn(logits[drawn], [draws[row] for row in drawn])
    wanted = [row for row, one in enumerate(draws) if one.sampling.logprobs is not None and bool(finite[row])]
    logprobs = dict(zip(wanted, _logprobs(logits[wanted], chosen[wanted], [draws[row] for row in wanted]), strict=True))
    return [
        Choice(token, logprobs.get(row)) if fine else None
        for row, (token, fine) in enumerate(zip(chosen.tolist(), finite.tolist(), strict=True))
    ]


def _drawn(logits: Tensor, draws: list[Draws]) -> Tensor:
    """Return ``[n]`` int64, a token of each row by its temperature and ``top_p``."""
    temperature = torch.tensor([one.sampling.temperature for one in draws], dtype=torch.float64)
    place = torch.tensor([one.random.random() for one in draws], dtype=torch.float64)
    # Below the highest, so that no temperature is too low to divide by.
    probability = ((logits.double() - logits.amax(1, keepdim=True)) / temperature[:, None]).softmax(1)
    cut = [row for row, one in enumerate(draws) if one.sampling.top_p < 1]
    found = _at(probability, place)
    for row in cut:
        found[row] = _among_best(probability[row], draws[row].sampling.top_p, place[row])
    return found


def _at(weight: Tensor, place: Tensor) -> Tensor:
    """Return ``[n]``, where in the running sum of the weights ``[n, V]`` the share ``place`` ``[n]`` of all lies."""
    ends = weight.cumsum(1)
    found = torch.searchsorted(ends, (place * ends[:, -1])[:, None], right=True)[:, 0]
    return found.clamp(max=weight.shape[1] - 1)


def _among_best(probability: Tensor, top_p: float, place: Tensor) -> Tensor:
    values, ids = probability.topk(min(BEST, len(probability)))
    if float(values.sum()) < top_p:
        values, ids = probability.sort(descending=True)
    before = values.cumsum(0) - values
    values = torch.where(before < top_p, values, 0)  # the first one always stays
    return ids[_at(values[None], place[None])[0]]


def _logprobs(logits: Tensor, chosen: Tensor, draws: list[Draws]) -> list[TokenLogprobs]:
    """Return the decoder's own log-probabilities, whatever the temperature is."""
    values = logits.log_softmax(1)
    found = []
    for row, one in enumerate(draws):
        best, ids = values[row].topk(min(one.sampling.logprobs or 0, values.shape[1]))
        found.append(
            TokenLogprobs(float(values[row, chosen[row]]), tuple(zip(ids.tolist(), best.tolist(), strict=True)))
        )
    return found
