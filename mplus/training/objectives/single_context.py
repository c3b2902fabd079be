"""Single context and repeat: chunks written with gradient into the pool, texts read with all of memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from attrs import define, field

from mplus.config import whole
from mplus.training.batch import Batch
from mplus.training.objectives.base import Objective, ObjectiveResult
from mplus.training.objectives.full_read import full_read, write
from mplus.training.objectives.losses import RetrieverLoss

if TYPE_CHECKING:
    from mplus.mechanisms.streams import TrainingStreams
    from mplus.training.decoder import TrainedDecoder


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
