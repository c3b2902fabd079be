"""TrainingStep: one forward for all that a step computes; and Validator, the same losses on other data."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import attrs
import torch
from attrs import define
from torch import Tensor, nn

from mplus.hf.decoders.train_model import TrainTokenizer
from mplus.hf.model.installed import WrappedModel
from mplus.hf.model.modes import in_eval_mode
from mplus.mechanisms.streams import TrainingStreams
from mplus.training.activations.managed import ActivationPlan
from mplus.training.batch import Batch
from mplus.training.checkpoint import random_state, set_random_state
from mplus.training.decoder import TrainedDecoder, make_streams
from mplus.training.metrics import RunningMeans
from mplus.training.objectives.base import Objective
from mplus.training.objectives.losses import RetrieverLoss
from mplus.training.parallel import rank
from mplus.training.recipe.recipe import Recipe, Validation
from mplus.training.setup import derive_seed, make_source


@define(frozen=True, eq=False)
class LossTerm:
    """One objective with its batch.

    Attributes:
        label: in front of the names of its metrics.
        objective: computes a loss.
        batch: of what.
        weight: factor on the loss.
        retriever_loss: None: the retriever learns nothing.
    """

    label: str
    objective: Objective
    batch: Batch
    weight: float = 1.0
    retriever_loss: RetrieverLoss | None = None


class TrainingStep(nn.Module):
    """The decoder, called with streams and terms rather than ids.

    Args:
        model: the wrapped decoder.
        dtype: what it computes in; float32 leaves everything as it is.
        activations: what becomes of the activations of its layers; None: they are kept, and not counted.
    """

    def __init__(
        self, model: WrappedModel, dtype: torch.dtype = torch.float32, activations: ActivationPlan | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype
        self.activations = activations
        self._no_split_modules = model._no_split_modules  # noqa: SLF001 - read by accelerate when it shards the model

    def forward(self, streams: TrainingStreams, terms: Sequence[LossTerm]) -> tuple[Tensor, dict[str, float]]:
        """Return the loss of all terms, and their metrics.

        A metric ``m`` of a term is found as ``label/m``, and as ``m`` where an earlier term has not taken the name.
        """
        decoder = TrainedDecoder(self.model)
        device = decoder.engine.device
        losses, metrics = [], {}
        mixed = self.dtype != torch.float32
        planned = nullcontext() if self.activations is None else self.activations.applied(self.model)
        with torch.autocast(device.type, dtype=self.dtype) if mixed else nullcontext(), planned:
            for term in terms:
                outcome = term.objective(decoder, streams, on_device(term.batch, device), term.retriever_loss)
                losses.append(term.weight * outcome.loss.float())
                for name, value in outcome.metrics.items():
                    if math.isnan(value):  # nothing in the batch that it could be about
                        continue
                    metrics[f"{term.label}/{name}"] = value
                    metrics.setdefault(name, value)
        return torch.stack(losses).sum(), metrics

    def activation_metrics(self) -> dict[str, float]:
        """Return bytes held and tokens recomputed since the last call, where not all activations are kept."""
        if self.activations is None:
            return {}
        found = self.activations.counter.metrics()
        self.activations.counter.restart()
        return found


def on_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with its tensors where the decoder is."""
    if batch.chunks.device == device:
        return batch
    moved: dict[str, Any] = {
        name: value.to(device, non_blocking=True)
        for name, value in attrs.asdict(batch, recurse=False).items()
        if isinstance(value, Tensor)
    }
    return attrs.evolve(batch, **moved)


class Validator:
    """Computes the metrics of a recipe's ``validation``; the same batches every time.

    Args:
        recipe: with a validation.
        options: that validation.
        tokenizer: for its data.
    """

    def __init__(self, recipe: Recipe, options: Validation, tokenizer: TrainTokenizer | None) -> None:
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
                # A copy: sources may change what they are given, and every validation begins at the same place.
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
    """Undo at the end what is drawn inside from the generators of the process."""
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)
