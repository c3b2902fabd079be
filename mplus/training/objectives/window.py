"""Window: the decoder alone, over the newest text as plain tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from attrs import define, field

from mplus.config import whole
from mplus.errors import ConfigError
from mplus.training.batch import Batch
from mplus.training.objectives.base import Objective, ObjectiveResult
from mplus.training.objectives.losses import RetrieverLoss, accuracy, token_loss

if TYPE_CHECKING:
    from mplus.mechanisms.streams import TrainingStreams
    from mplus.training.decoder import TrainedDecoder


class Window(Objective):
    """Read the batch's newest chunks and a text as one plain text, without memory and adapters.

    Gradients: the decoder's own weights, where they are trained. It makes a baseline, or a decoder from nothing.
    """

    @define(frozen=True, kw_only=True)
    class Options(Objective.Options):
        """``chunks``: chunks that a batch of its own has, for data that asks for what chunks tell; none is written."""

        chunks: int = field(default=0, validator=whole(0))

    options: Options
    name: ClassVar[str] = "window"
    metrics: ClassVar[tuple[str, ...]] = ("window_loss", "window_accuracy")

    @property
    def writes(self) -> bool:
        """No."""
        return False

    def __call__(
        self, decoder: TrainedDecoder, streams: TrainingStreams, batch: Batch, retriever_loss: RetrieverLoss | None
    ) -> ObjectiveResult:
        """Read plain text; see ``Objective``. Raises ConfigError when the batch's source makes no windows."""
        if batch.windows is None or batch.window_labels is None:
            raise ConfigError("objective 'window' needs a data set that makes windows: set its window size")
        logits = decoder.plain(batch.windows, batch.window_mask)
        loss = token_loss(logits, batch.window_labels)
        found = accuracy(logits[:, None], batch.window_labels[:, None])
        return ObjectiveResult(loss, {"window_loss": loss.item(), "window_accuracy": found})
