"""HMTSegments: both stages of HMT's training as one objective."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, cast

import torch
from attrs import define, evolve, field

from mplus.config import flag, number, whole
from mplus.errors import ConfigError
from mplus.mechanisms.decoder import Text
from mplus.mechanisms.separate_streams import SeparateStreams
from mplus.memory.state import StreamView
from mplus.training.objectives.base import Objective, ObjectiveResult
from mplus.training.objectives.full_memory import full_read, write
from mplus_hmt.mechanism import HMTMechanism
from mplus_hmt.recall import retrieval_loss, side_by_side_lists
from mplus_hmt.state import HMTState

if TYPE_CHECKING:
    from mplus.mechanisms.streams import TrainingStreams
    from mplus.training.batch import Batch
    from mplus.training.decoder import TrainedDecoder
    from mplus.training.objectives.losses import RetrieverLoss


class HMTSegments(Objective):
    """Write segments with gradient, and read a last one that is scored: both stages of HMT's training.

    Gradients: everything, through the whole list, all summaries and all recalls, back to the first of these segments;
    what was written in earlier steps is cut off.

    Example:
        A stage of a recipe, as published without recall first:

        ```toml
        [[stages]]
        name = "without recall"
        steps = 200
        objectives = [{ name = "hmt", data = "novel", chunks = 2, recall = false }]
        ```
    """

    @define(frozen=True, kw_only=True)
    class Options(Objective.Options):
        """Options of the objective.

        Attributes:
            chunks: segments that are written, as far as a batch has so many (``bptt_depth`` less the last one).
            recall: False: the first stage, in which the newest vector is the prompt.
            retrieval_loss: weight of the cross-entropy of the last recall with the vectors of the source that a text
                needs (published, where it is used: 0.05); 0: none.
            softmax_twice: take that loss as the released code does, with a second softmax.
        """

        chunks: int = field(default=1, validator=whole(1))
        recall: bool = field(default=True, validator=flag)
        retrieval_loss: float = field(default=0.0, validator=number(0))
        softmax_twice: bool = field(default=False, validator=flag)

    options: Options
    name: ClassVar[str] = "hmt"
    metrics: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "retrieval_loss")

    def __call__(
        self, decoder: TrainedDecoder, streams: TrainingStreams, batch: Batch, retriever_loss: RetrieverLoss | None
    ) -> ObjectiveResult:
        """Write and read; see ``Objective``. Raises ConfigError where the decoder has another mechanism."""
        mechanism = decoder.engine.mechanism
        if not isinstance(mechanism, HMTMechanism) or not isinstance(streams, SeparateStreams):
            raise ConfigError(f"the objective 'hmt' trains the mechanism 'hmt', and this one is {mechanism.name!r}")
        streams.detach()
        states = cast("list[HMTState]", streams.states)
        streams.states = [evolve(state, newest_only=not self.options.recall) for state in states]
        write(streams, batch)
        found = full_read(decoder, streams, batch, None)
        if not (self.options.recall and self.options.retrieval_loss):
            return found
        term = self._retrieval_loss(mechanism, streams, batch)
        return ObjectiveResult(
            found.loss + self.options.retrieval_loss * term, {**found.metrics, "retrieval_loss": term.item()}
        )

    def _retrieval_loss(self, mechanism: HMTMechanism, streams: SeparateStreams, batch: Batch) -> torch.Tensor:
        """Return the loss of the recall that every text begins with; the topic summaries are made once more."""
        parts = zip(streams.states, streams.stores, strict=True)
        views = [StreamView(state, store.snapshot()) for state, store in parts for _ in range(batch.texts.shape[1])]
        ids = batch.texts.flatten(0, 1)
        mask = batch.mask if batch.query_mask is None else batch.query_mask & batch.mask
        embedded = streams.decoder.embed(Text(ids).need_ids())
        recalled = mechanism.recalled(streams.decoder, views, embedded, mask.flatten(0, 1), adapter="read")
        sources = [view.store.gather(0, view.store.ids(0)).source for view in views]
        wanted = batch.text_sources.flatten().to(ids.device)
        held, _ = side_by_side_lists([one[:, None] + 1 for one in sources])  # 0: there is no vector
        positives = ((held[:, :, 0] == wanted[:, None] + 1) & (held[:, :, 0] > 0)).to(embedded)
        scores = recalled.scores
        if scores is None:
            return embedded.sum() * 0.0
        return retrieval_loss(scores[:, 0].to(embedded), positives, twice=self.options.softmax_twice)
