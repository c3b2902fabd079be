"""Two chunks: one is written, the next is read with the rows of that write alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from attrs import define, field

from mplus.config import one_of
from mplus.training.batch import Batch
from mplus.training.objectives.base import Objective, ObjectiveResult
from mplus.training.objectives.losses import RetrieverLoss, accuracy, token_loss

if TYPE_CHECKING:
    from mplus.mechanisms.streams import TrainingStreams
    from mplus.training.decoder import TrainedDecoder


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
        self, decoder: TrainedDecoder, streams: TrainingStreams, batch: Batch, retriever_loss: RetrieverLoss | None
    ) -> ObjectiveResult:
        """Encode one chunk and read its rows; see ``Objective``. Afterwards the streams hold the new rows, detached."""
        streams.detach()
        update = streams.encode(batch.chunks[:, -1])
        read = streams.read_update(update, batch.texts, self.options.reader)
        loss = token_loss(read.logits, batch.labels)
        streams.absorb(update.detach(), batch.sources[:, -1])
        return ObjectiveResult(
            loss, {"loss": loss.item(), "accuracy": accuracy(read.logits, batch.labels, batch.answer_mask)}
        )
