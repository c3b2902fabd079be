"""The fit of two maps to pairs of mean hidden states, by contrast with the other passages of a batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from attrs import define, evolve, field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout

from mplus.config import number, whole
from mplus.errors import TrainingError
from mplus.retrievers.chunks.hidden import Statistics, standardised
from mplus.retrievers.chunks.trained import TENSORS, TrainedMaps, embedded

CHOSEN_BY = 256
"""Pairs that the layers are chosen by."""
EVERY = 20
"""Steps between two looks at what is held out."""

StepProgress = Callable[[int], None]
"""Called with the steps done since the last call."""


@define(frozen=True, kw_only=True)
class FitOptions:
    """Options of the fit.

    Attributes:
        layers: how many layers of the decoder are compared.
        rank: r of the maps.
        steps: at most; it ends sooner where what is held out gets no better for ``patience`` steps.
        patience: see ``steps``.
        batch: pairs of a step; the passages of the others are the wrong ones.
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        dropout: share of the numbers of both texts that are set to zero in a step.
        temperature: that cosines are divided by at the start; it is trained.
        seed: of the maps, of batches and of dropout.
    """

    layers: int = field(default=3, validator=whole(1))
    rank: int = field(default=64, validator=whole(1))
    steps: int = field(default=400, validator=whole(0))
    patience: int = field(default=100, validator=whole(1))
    batch: int = field(default=256, validator=whole(2))
    learning_rate: float = field(default=3e-4, validator=number(0))
    weight_decay: float = field(default=0.1, validator=number(0))
    dropout: float = field(default=0.2, validator=number(0, 1))
    temperature: float = field(default=0.05, validator=number(1e-4))
    seed: int = field(default=0, validator=whole(0))


@define(frozen=True, eq=False)
class PooledPairs:
    """Mean hidden states of pairs.

    Attributes:
        passages: ``[p, depth + 1, d]`` floating.
        queries: ``[q, depth + 1, d]``.
        right: ``[q]`` int64, the place of each query's passage.
    """

    passages: Tensor
    queries: Tensor
    right: Tensor


def fit(
    decoder: str,
    pairs: PooledPairs,
    held_out: PooledPairs,
    options: FitOptions,
    progress: StepProgress = lambda steps: None,
) -> tuple[TrainedMaps, list[dict[str, float]]]:
    """Return maps, those with the lowest loss on ``held_out``, and that loss at the steps where it was looked at.

    The loss is InfoNCE (van den Oord et al. 2018): the cross entropy of the right passage among those of the batch.
    At step 0 the maps change nothing, so that what comes back is on ``held_out`` never worse than no training.

    Raises:
        TrainingError: the loss is not finite.
    """
    torch_state = torch.random.get_rng_state()
    try:
        torch.manual_seed(options.seed)
        return _fit(decoder, pairs, held_out, options, progress)
    finally:
        torch.random.set_rng_state(torch_state)


def _fit(
    decoder: str, pairs: PooledPairs, held_out: PooledPairs, options: FitOptions, progress: StepProgress
) -> tuple[TrainedMaps, list[dict[str, float]]]:
    start = _start(decoder, pairs, options)
    passages, queries = _standard(start, pairs)
    apart = _standard(start, held_out)
    weights = [
        nn.Parameter(one.clone()) for one in (start.chunk_down, start.chunk_up, start.query_down, start.query_up)
    ]
    sharpness = nn.Parameter(torch.tensor(-math.log(options.temperature)))
    groups = [{"params": weights, "weight_decay": options.weight_decay}, {"params": [sharpness], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate)
    best, kept, seen = math.inf, [one.detach().clone() for one in weights], list[dict[str, float]]()
    best_step = 0
    for step in range(options.steps + 1):
        if step % EVERY == 0 or step == options.steps:
            with torch.no_grad():
                loss = float(_loss(weights, sharpness, *apart, held_out.right))
            seen.append({"step": step, "held_out_loss": loss})
            if loss < best:
                best, best_step, kept = loss, step, [one.detach().clone() for one in weights]
            if step - best_step >= options.patience or step == options.steps:
                break
        chosen = torch.randperm(len(queries))[: options.batch]
        own, right = pairs.right[chosen].unique(return_inverse=True)
        texts = [dropout(one, options.dropout) for one in (passages[own], queries[chosen])]
        found = _loss(weights, sharpness, texts[0], texts[1], right)
        if not bool(found.isfinite()):
            raise TrainingError(f"the loss must be finite, got {found.item()} at step {step}: lower the learning rate")
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
        progress(1)
    parts: dict[str, Any] = dict(zip(TENSORS[3:], kept, strict=True))
    return evolve(start, **parts), seen


def _start(decoder: str, pairs: PooledPairs, options: FitOptions) -> TrainedMaps:
    """Return maps that change nothing, of the layers in which queries are closest to their own passages."""
    own = pairs.passages[pairs.right]
    some = torch.randperm(len(own))[:CHOSEN_BY]
    layers = Statistics.of(own[some].float(), pairs.queries[some].float(), options.layers).layers
    spread = []
    for texts in (pairs.passages, pairs.queries):
        means = texts[:, layers].float()
        spread.append(torch.stack([means.mean(0), means.std(0) + 1e-4]))
    width = spread[0][0].numel()
    down = [torch.randn(width, options.rank) / width**0.5 for _ in range(2)]
    up = torch.zeros(options.rank, width)
    return TrainedMaps(decoder, layers, spread[0], spread[1], down[0], up, down[1], up)


def _standard(maps: TrainedMaps, pairs: PooledPairs) -> tuple[Tensor, Tensor]:
    """Return the standardised means ``[n, k, d]`` of passages and of queries."""
    passages, queries = pairs.passages[:, maps.layers].float(), pairs.queries[:, maps.layers].float()
    return standardised(passages, maps.chunks), standardised(queries, maps.queries)


def _loss(weights: list[nn.Parameter], sharpness: Tensor, passages: Tensor, queries: Tensor, right: Tensor) -> Tensor:
    chunk_down, chunk_up, query_down, query_up = weights
    cosines = embedded(queries, query_down, query_up) @ embedded(passages, chunk_down, chunk_up).T
    return cross_entropy(cosines * sharpness.exp(), right)
