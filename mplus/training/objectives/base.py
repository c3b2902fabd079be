"""Objective: one way of making a loss from a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from attrs import define, field
from torch import Tensor

from mplus.training.batch import Batch

if TYPE_CHECKING:
    from mplus.mechanisms.streams import TrainingStreams
    from mplus.training.decoder import TrainedDecoder
    from mplus.training.objectives.losses import RetrieverLoss


@define(frozen=True, eq=False)
class ObjectiveResult:
    """Loss and metrics of one batch.

    Attributes:
        loss: scalar to minimise, with its graph.
        metrics: name -> scalar without graph (``loss``, ``accuracy``, ``retriever_loss``, ``recall`` ...).
    """

    loss: Tensor
    metrics: dict[str, float] = field(factory=dict)


class Objective(ABC):
    """Makes a loss of a ``Batch``; may write into the streams. Built as ``Objective(options)``; keeps no state.

    The parameters that get a gradient are part of what an objective is (published: training table, section 2.4 of
    the released code): each says so in its docstring, and a test holds it to that.

    Example:
        >>> from mplus.training.objectives.base import Objective, ObjectiveResult
        >>> from mplus.training.objectives.losses import token_loss
        >>> class Recite(Objective):
        ...     name = "recite"
        ...     chunks = 1
        ...     def __call__(self, decoder, streams, batch, retriever_loss):
        ...         streams.detach()
        ...         streams.write(batch.chunks[:, 0], batch.sources[:, 0])
        ...         loss = token_loss(streams.read(batch.texts).logits, batch.labels)
        ...         return ObjectiveResult(loss, {"loss": loss.item()})
        >>> Recite().writes
        True
    """

    @define(frozen=True, kw_only=True)
    class Options:
        """Options of the objective (attrs class; the base class has none)."""

    name: ClassVar[str]
    repeats: ClassVar[bool] = False
    """Whether it asks its source for the repeat task."""
    needs_cache: ClassVar[bool] = False
    """Whether it takes a batch seen before instead of a new one."""
    metrics: ClassVar[tuple[str, ...]] = ("loss", "accuracy")
    """Names of the metrics that every result may have."""

    def __init__(self, options: Options | None = None) -> None:
        self.options = options if options is not None else self.Options()

    @property
    def chunks(self) -> int:
        """Return the number of chunks that a batch for this objective should have."""
        return int(getattr(self.options, "chunks", 0))

    @property
    def writes(self) -> bool:
        """Return whether it writes the batch's chunks into the streams."""
        return self.chunks > 0

    @abstractmethod
    def __call__(
        self, decoder: TrainedDecoder, streams: TrainingStreams, batch: Batch, retriever_loss: RetrieverLoss | None
    ) -> ObjectiveResult:
        """Return the loss of ``batch``; ``retriever_loss`` None: none is wanted."""
