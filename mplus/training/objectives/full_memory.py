"""Reading the texts of a batch with all of memory: what most objectives share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
from attrs import define, field
from torch import Tensor

from mplus.config import whole
from mplus.training.batch import IGNORE_INDEX, NO_SOURCE, Batch
from mplus.training.objectives.base import Objective, ObjectiveResult
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
    # What stands in front of all answers needs no logits, and the head is a fifth of a small decoder's work.
    kept = predicted_tokens(batch.labels)
    read = streams.read(batch.texts, queries=query_mask, candidates=candidates, logits_to_keep=kept)
    labels, answers = batch.labels[..., -kept:], batch.answer_mask
    loss = token_loss(read.logits, labels)
    right = accuracy(read.logits, labels, None if answers is None else answers[..., -kept:])
    metrics = {"loss": loss.item(), "accuracy": right}
    if retriever_loss is not None and retriever is not None:
        term = retriever_loss(retriever, read, query_mask, batch.text_sources)
        metrics["retriever_loss"] = term.item()
        loss = loss + term
    metrics.update(recall(read, batch.text_sources))
    return ObjectiveResult(loss, {name: value for name, value in metrics.items() if not math.isnan(value)})


def predicted_tokens(labels: Tensor) -> int:
    """Return how many last tokens of texts are predicted or predict: from the one in front of the first label on.

    Args:
        labels: ``[B, R, T]``, as for ``token_loss``.
    """
    wanted = (labels != IGNORE_INDEX).flatten(0, 1).any(0).nonzero()
    first = max(int(wanted[0]) - 1, 0) if len(wanted) else labels.shape[-1] - 1
    return labels.shape[-1] - first


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


class PlainLM(Objective):
    """Read the texts with whatever memory there is; write nothing (published: 5 to 10 % of the steps).

    Gradients: read adapter, begin rows. It keeps the reader from being led astray by memory that does not matter.
    """

    name: ClassVar[str] = "plain_lm"

    def __call__(
        self, decoder: TrainedDecoder, streams: TrainingStreams, batch: Batch, retriever_loss: RetrieverLoss | None
    ) -> ObjectiveResult:
        """Read only; see ``Objective``. What the texts need was not written, so the retriever learns nothing."""
        streams.detach()
        return full_read(decoder, streams, batch, None)


class MultiChunk(Objective):
    """Write up to ``chunks`` chunks into the streams, detached, and read the texts (M+ section 3.3, stage 3).

    Gradients: read adapter, begin rows, retriever. The reader learns to find a few rows among many.
    """

    @define(frozen=True, kw_only=True)
    class Options(Objective.Options):
        """``chunks``: chunks written, as far as a batch has so many."""

        chunks: int = field(default=2, validator=whole(1))

    options: Options
    name: ClassVar[str] = "multi_chunk"

    def __call__(
        self, decoder: TrainedDecoder, streams: TrainingStreams, batch: Batch, retriever_loss: RetrieverLoss | None
    ) -> ObjectiveResult:
        """Write without gradient and read; see ``Objective``."""
        streams.detach()
        with torch.no_grad():
            write(streams, batch)
        return full_read(decoder, streams, batch, retriever_loss)


class SingleContext(Objective):
    """Write chunks with gradient, let them enter the STM, and read the texts with all of memory.

    Gradients: write adapter and mark, read adapter, begin rows, retriever. The only objective that trains the writer
    against the reader that is used at inference, among rows that do not matter. The released code does it by
    accident, for documents of one context in stages 1 and 2; here it is meant.
    """

    @define(frozen=True, kw_only=True)
    class Options(Objective.Options):
        """``chunks``: chunks written in a row, all with gradient."""

        chunks: int = field(default=1, validator=whole(1))

    options: Options
    name: ClassVar[str] = "single_context"

    def __call__(
        self, decoder: TrainedDecoder, streams: TrainingStreams, batch: Batch, retriever_loss: RetrieverLoss | None
    ) -> ObjectiveResult:
        """Write and read; see ``Objective``. The streams keep the graph of these writes until the next batch."""
        streams.detach()
        write(streams, batch)
        return full_read(decoder, streams, batch, retriever_loss)


class Repeat(SingleContext):
    """Do as ``single_context`` does, with texts that ask for the chunks word by word (released code: 10 % of samples).

    Gradients: as ``single_context``. It pushes towards storage without loss.
    """

    name: ClassVar[str] = "repeat"
    repeats: ClassVar[bool] = True


class Revisit(Objective):
    """Read the texts of an earlier batch, whose chunks have aged meanwhile; write nothing (MemoryLLM section 3.2.3).

    Gradients: read adapter, begin rows, retriever. It is what keeps old rows readable.
    """

    name: ClassVar[str] = "revisit"
    needs_cache: ClassVar[bool] = True

    def __call__(
        self, decoder: TrainedDecoder, streams: TrainingStreams, batch: Batch, retriever_loss: RetrieverLoss | None
    ) -> ObjectiveResult:
        """Read ``batch``, the earlier one; see ``Objective``."""
        streams.detach()
        return full_read(decoder, streams, batch, retriever_loss)
