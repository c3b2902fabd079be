"""Multi-chunk: several chunks are written without gradient, then the text is read with all of memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from attrs import define, field

from mplus.config import whole
from mplus.training.batch import Batch
from mplus.training.objectives.base import Objective, ObjectiveResult
from mplus.training.objectives.full_read import full_read, write
from mplus.training.objectives.losses import RetrieverLoss

if TYPE_CHECKING:
    from mplus.mechanisms.streams import TrainingStreams
    from mplus.training.decoder import TrainedDecoder


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
