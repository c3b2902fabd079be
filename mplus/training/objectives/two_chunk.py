"""Two chunks: one is written, the next is read with the rows of that write alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from attrs import define, field

from mplus.config import one_of
from mplus.training.batch import Batch
from mplus.training.losses import RetrieverLoss, accuracy, token_loss
from mplus.training.objectives.base import Objective, ObjectiveResult

if TYPE_CHECKING:
    from mplus.training.batched.read import DenseDecoder
    from mplus.training.batched.stream_batch import StreamBatch


class TwoChunk(Objective):
    """Compress a chunk into K rows and read the texts with these alone (M+ section 3.3; MemoryLLM section 3.2.1).

    Gradients: write adapter and mark through the write, begin rows, and the adapter that reads. With the published
    ``reader = "write"`` that is the write adapter again; ``"read"`` trains the adapter that reads at inference.
    """

    @define(frozen=True, kw_only=True)
    class Options(Objective.Options):
        """``reader``: the adapter the texts are read with."""

        reader: Literal["write", "read"] = field(default="write", validator=one_of("write", "read"))

    options: Options
    name: ClassVar[str] = "two_chunk"

    @property
    def chunks(self) -> int:
        """One: the chunk before the text."""
        return 1

    def __call__(
        self, decoder: DenseDecoder, streams: StreamBatch, batch: Batch, retriever_loss: RetrieverLoss | None
    ) -> ObjectiveResult:
        """See ``Objective``. Afterwards the streams hold the new rows, detached."""
        streams.detach()
        block = streams.encode(batch.chunks[:, -1])
        read = decoder.read_rows(block, batch.texts, self.options.reader)
        loss = token_loss(read.logits, batch.labels)
        streams.absorb([rows.detach() for rows in block], batch.sources[:, -1])
        return ObjectiveResult(
            loss, {"loss": loss.item(), "accuracy": accuracy(read.logits, batch.labels, batch.answer_mask)}
        )
