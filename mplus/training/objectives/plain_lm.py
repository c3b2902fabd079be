"""Plain language modelling with the memory attached."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from mplus.training.batch import Batch
from mplus.training.objectives.base import Objective, ObjectiveResult
from mplus.training.objectives.full_read import full_read
from mplus.training.objectives.losses import RetrieverLoss

if TYPE_CHECKING:
    from mplus.mechanisms.streams import TrainingStreams
    from mplus.training.decoder import TrainedDecoder


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
