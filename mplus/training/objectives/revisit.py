"""Revisit: a text seen before is read again, after other chunks were written."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from mplus.training.batch import Batch
from mplus.training.objectives.base import Objective, ObjectiveResult
from mplus.training.objectives.full_read import full_read
from mplus.training.objectives.losses import RetrieverLoss

if TYPE_CHECKING:
    from mplus.mechanisms.streams import TrainingStreams
    from mplus.training.decoder import TrainedDecoder


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
