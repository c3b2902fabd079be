"""TrainingStep: one forward for all that a step computes, so that it can be wrapped for several processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import attrs
import torch
from attrs import define
from torch import Tensor, nn

from mplus.hf.decoders.train_model import split_modules
from mplus.mechanisms.streams import TrainingStreams
from mplus.training.batch import Batch
from mplus.training.decoder import TrainedDecoder
from mplus.training.objectives.base import Objective
from mplus.training.objectives.losses import RetrieverLoss


@define(frozen=True, eq=False)
class LossTerm:
    """One objective with its batch.

    Attributes:
        label: in front of the names of its metrics.
        objective, batch, weight, retriever_loss: what is computed, and how much it counts.
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
    """

    def __init__(self, model: Any, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype
        self._no_split_modules = split_modules(model)  # read by accelerate when it shards the model

    def forward(self, streams: TrainingStreams, terms: Sequence[LossTerm]) -> tuple[Tensor, dict[str, float]]:
        """Return the loss of all terms, and their metrics.

        A metric ``m`` of a term is found as ``label/m``, and as ``m`` where an earlier term has not taken the name.
        """
        decoder = TrainedDecoder(self.model)
        device = decoder.engine.device
        losses, metrics = [], {}
        mixed = self.dtype != torch.float32
        with torch.autocast(device.type, dtype=self.dtype) if mixed else nullcontext():
            for term in terms:
                outcome = term.objective(decoder, streams, on_device(term.batch, device), term.retriever_loss)
                losses.append(term.weight * outcome.loss.float())
                for name, value in outcome.metrics.items():
                    if math.isnan(value):  # nothing in the batch that it could be about
                        continue
                    metrics[f"{term.label}/{name}"] = value
                    metrics.setdefault(name, value)
        return torch.stack(losses).sum(), metrics


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
