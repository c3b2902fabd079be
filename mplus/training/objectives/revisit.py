"""Revisit: a text seen before is read again, after other chunks were written."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from mplus.training.batch import Batch
from mplus.training.losses import RetrieverLoss
from mplus.training.objectives.base import Objective, ObjectiveResult
from mplus.training.objectives.full_read import full_read

if TYPE_CHECKING:
    from mplus.training.batched.read import DenseDecoder
    from mplus.training.batched.stream_batch import StreamBatch


class Revisit(Objective):
    """Read the texts of an earlier batch, whose chunks have aged meanwhile; write nothing (MemoryLLM section 3.2.3).

    Gradients: read adapter, begin rows, retriever. It is what keeps old rows readable.
    """

    name: ClassVar[str] = "revisit"
    needs_cache: ClassVar[bool] = True

    def __call__(
        self, decoder: DenseDecoder, streams: StreamBatch, batch: Batch, retriever_loss: RetrieverLoss | None
    ) -> ObjectiveResult:
        """See ``Objective``; ``batch`` is the earlier one."""
        streams.detach()
        return full_read(decoder, streams, batch, retriever_loss)
