"""Reading the texts of a batch with all of memory: what most objectives share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mplus.training.batch import NO_SOURCE, Batch
from mplus.training.objectives.base import ObjectiveResult
from mplus.training.objectives.losses import RetrieverLoss, accuracy, token_loss

if TYPE_CHECKING:
    from mplus.mechanisms.streams import Read, TrainingStreams
    from mplus.training.decoder import TrainedDecoder


def write(streams: TrainingStreams, batch: Batch) -> None:
    """Write the batch's chunks into the streams, in order; gradients flow where they are enabled."""
    for place in range(batch.chunks.shape[1]):
        streams.write(batch.chunks[:, place], batch.sources[:, place])


def full_read(
    decoder: TrainedDecoder, streams: TrainingStreams, batch: Batch, retriever_loss: RetrieverLoss | None
) -> ObjectiveResult:
    """Return the loss of the batch's texts, read with begin row, retrieved rows and STM, plus the retriever's loss."""
    query_mask = batch.mask if batch.query_mask is None else batch.query_mask & batch.mask
    retriever = decoder.engine.mechanism.retriever
    candidates = None
    if retriever_loss is not None and retriever is not None:
        candidates = retriever_loss.wanted(batch.text_sources, streams.choices)
    read = streams.read(batch.texts, queries=query_mask, candidates=candidates)
    loss = token_loss(read.logits, batch.labels)
    metrics = {"loss": loss.item(), "accuracy": accuracy(read.logits, batch.labels, batch.answer_mask)}
    if retriever_loss is not None and retriever is not None:
        term = retriever_loss(retriever, read, query_mask, batch.text_sources)
        metrics["retriever_loss"] = term.item()
        loss = loss + term
    metrics.update(recall(read, batch.text_sources))
    return ObjectiveResult(loss, {name: value for name, value in metrics.items() if not math.isnan(value)})


@torch.no_grad()
def recall(read: Read, text_sources: Tensor) -> dict[str, float]:
    """Return per layer the share of the rows of a text's source that were retrieved for it (``recall_0`` ...).

    Of the rows that retrieval chooses from. Counted over the texts for which there are such rows, each weighing as much
    as it has; NaN where there are none.

    Args:
        read: of texts.
        text_sources: ``[B, R]`` int64, the source that each text needs; ``NO_SOURCE``: none.
    """
    found = {}
    for layer, seen in read.layers.items():
        if seen.selected_source is None or seen.searched_source is None:
            continue
        asked = text_sources[:, :, None]
        real = asked != NO_SOURCE
        have = ((seen.searched_source[:, None] == asked) & real).sum()
        hit = ((seen.selected_source == asked) & real).sum()
        found[f"recall_{layer}"] = float(hit / have) if int(have) else float("nan")
    return found
