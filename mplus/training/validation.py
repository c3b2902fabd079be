"""Validation: the same losses on other data, with memories of their own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mplus.hf.model.modes import in_eval_mode
from mplus.mechanisms.streams import TrainingStreams
from mplus.training.checkpoint import random_state, set_random_state
from mplus.training.decoder import make_streams
from mplus.training.metrics import RunningMeans
from mplus.training.parallel import rank
from mplus.training.recipe.recipe import Recipe, Validation
from mplus.training.setup import derive_seed, make_source
from mplus.training.step import LossTerm, TrainingStep


class Validator:
    """Computes the metrics of a recipe's ``validation``; the same batches every time.

    Args:
        recipe: with a validation.
        options: that validation.
        tokenizer: for its data.
    """

    def __init__(self, recipe: Recipe, options: Validation, tokenizer: Any) -> None:
        self._recipe = recipe
        self._options = options
        count = options.streams or recipe.streams
        self._numbers = range(rank() * count, (rank() + 1) * count)
        self._sources = [
            make_source(
                recipe.data[str(entry.data)],
                tokenizer=tokenizer,
                numbers=self._numbers,
                seed=derive_seed(recipe.seed, "validation", place),
            )
            for place, entry in enumerate(options.objectives)
        ]
        self._begin = [copy.deepcopy(source.state_dict()) for source in self._sources]

    @torch.no_grad()
    def run(self, step: TrainingStep) -> dict[str, float]:
        """Return metrics as ``validation/OBJECTIVE/METRIC``, means over batches and processes. All must call it."""
        means = RunningMeans()
        with isolated_rng(), in_eval_mode(step):
            for place, (entry, source) in enumerate(zip(self._options.objectives, self._sources, strict=True)):
                source.load_state_dict(copy.deepcopy(self._begin[place]))
                streams = self._streams(step)
                label = f"validation/{entry.name}"
                if sum(other.name == entry.name for other in self._options.objectives) > 1:
                    label += f"({entry.data})"
                for _ in range(self._options.steps):
                    objective = entry.objective
                    batch = source.next_batch(objective.chunks, repeat=objective.repeats)
                    if batch.reset:
                        streams.reset()
                    _, metrics = step(streams, [LossTerm(label, objective, batch)])
                    means.add({name: value for name, value in metrics.items() if name.startswith(label)})
        return means.reduce()

    def _streams(self, step: TrainingStep) -> TrainingStreams:
        seed = derive_seed(self._recipe.seed, "validation streams")
        return make_streams(step.model.mplus_engine, self._numbers, seed=seed, long_term=self._options.long_term)


@contextmanager
def isolated_rng() -> Iterator[None]:
    """Whatever is drawn inside from the generators of the process, outside it was not."""
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)
