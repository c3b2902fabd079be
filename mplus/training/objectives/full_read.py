"""Reading the texts of a batch with all of memory: what most objectives share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mplus.training.batch import NO_SOURCE, Batch
from mplus.training.batched.selection import ScorePicker
from mplus.training.losses import RetrieverLoss, accuracy, token_loss
from mplus.training.objectives.base import ObjectiveResult

if TYPE_CHECKING:
    from mplus.training.batched.read import DenseDecoder, Read
    from mplus.training.batched.stream_batch import StreamBatch


def write(streams: StreamBatch, batch: Batch) -> None:
    """Write the batch's chunks into the streams, in order; gradients flow where they are enabled."""
    for place in range(batch.chunks.shape[1]):
        streams.write(batch.chunks[:, place], batch.sources[:, place])


def full_read(
    decoder: DenseDecoder, streams: StreamBatch, batch: Batch, retriever_loss: RetrieverLoss | None
) -> ObjectiveResult:
    """The loss of the batch's texts, read with begin row, retrieved rows and STM, plus the retriever's loss."""
    query_mask = batch.mask if batch.query_mask is None else batch.query_mask & batch.mask
    retriever = decoder.engine.mechanism.additions.retriever
    picker = None if retriever is None or not streams.long_term_tokens else ScorePicker(retriever)
    wanted = None if retriever_loss is None else retriever_loss.wanted(batch.text_sources, streams.choices)
    read = decoder.read(streams, batch.texts, queries=query_mask, picker=picker, candidates=wanted)
    loss = token_loss(read.logits, batch.labels)
    metrics = {"loss": loss.item(), "accuracy": accuracy(read.logits, batch.labels, batch.answer_mask)}
    if retriever_loss is not None and retriever is not None:
        term = retriever_loss(retriever, read, query_mask, batch.text_sources)
        metrics["retriever_loss"] = term.item()
        loss = loss + term
    metrics.update(recall(read, streams, batch.text_sources))
    return ObjectiveResult(loss, {name: value for name, value in metrics.items() if not math.isnan(value)})


@torch.no_grad()
def recall(read: Read, streams: StreamBatch, text_sources: Tensor) -> dict[str, float]:
    """Per layer, the share of the long-term rows of what a text is about that were retrieved for it (``recall_0`` ...).

    Counted over the texts for which there are such rows, each weighing as much as it has; NaN where there are none.
    """
    found = {}
    for layer, seen in read.layers.items():
        if seen.picked_source is None:
            continue
        asked = text_sources[:, :, None]
        real = asked != NO_SOURCE
        have = ((streams.ltm[layer].source[:, None] == asked) & real).sum()
        hit = ((seen.picked_source == asked) & real).sum()
        found[f"recall_{layer}"] = float(hit / have) if int(have) else float("nan")
    return found
