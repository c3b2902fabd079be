"""Reading the texts of a turn with all of memory: what most objectives share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mplus.training.batch import NO_ONE, Turn
from mplus.training.batched.selection import ScorePicker
from mplus.training.losses import RetrieverLoss, accuracy, token_loss
from mplus.training.objectives.base import Outcome

if TYPE_CHECKING:
    from mplus.training.batched.read import DenseDecoder, Read
    from mplus.training.batched.stream_batch import StreamBatch


def write(streams: StreamBatch, turn: Turn) -> None:
    """Write the turn's chunks into the streams, in order; gradients flow where they are enabled."""
    for place in range(turn.chunks.shape[1]):
        streams.write(turn.chunks[:, place], turn.sources[:, place])


def full_read(decoder: DenseDecoder, streams: StreamBatch, turn: Turn, retriever_loss: RetrieverLoss | None) -> Outcome:
    """The loss of the turn's texts, read with begin row, retrieved rows and STM, plus the retriever's loss."""
    queries = turn.mask if turn.queries is None else turn.queries & turn.mask
    retriever = decoder.engine.mechanism.additions.retriever
    picker = None if retriever is None or not streams.long_term_tokens else ScorePicker(retriever)
    wanted = None if retriever_loss is None else retriever_loss.wanted(turn.about, streams.choices)
    read = decoder.read(streams, turn.texts, queries=queries, picker=picker, candidates=wanted)
    loss = token_loss(read.logits, turn.labels)
    metrics = {"loss": loss.item(), "accuracy": accuracy(read.logits, turn.labels, turn.answers)}
    if retriever_loss is not None and retriever is not None:
        term = retriever_loss(retriever, read, queries, turn.about)
        metrics["retriever_loss"] = term.item()
        loss = loss + term
    metrics.update(recall(read, streams, turn.about))
    return Outcome(loss, {name: value for name, value in metrics.items() if not math.isnan(value)})


@torch.no_grad()
def recall(read: Read, streams: StreamBatch, about: Tensor) -> dict[str, float]:
    """Per layer, the share of the long-term rows of what a text is about that were retrieved for it (``recall_0`` ...).

    Counted over the texts for which there are such rows, each weighing as much as it has; NaN where there are none.
    """
    found = {}
    for layer, seen in read.layers.items():
        if seen.picked_source is None:
            continue
        asked = about[:, :, None]
        real = asked != NO_ONE
        have = ((streams.ltm[layer].source[:, None] == asked) & real).sum()
        hit = ((seen.picked_source == asked) & real).sum()
        found[f"recall_{layer}"] = float(hit / have) if int(have) else float("nan")
    return found
