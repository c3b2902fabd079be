"""Questions to many streams at one moment, and the ways of reading these."""

from __future__ import annotations

from attrs import define
from torch import Tensor

from mplus.evaluation.execution.base import ID_BYTES, Moment
from mplus.evaluation.execution.selection import OracleSelector
from mplus.mechanisms.short_term.batched_prefix import RowSelector
from mplus.mechanisms.short_term.batched_streams import BatchedStreams


@define(eq=False)
class StreamMoment(Moment):
    """Questions to B streams, A to each.

    Attributes:
        memory: the streams.
        texts: ``[B, A, T]`` int64: the question and its right answer, padded on the right.
        queries: ``[B, A, T]`` bool, the question's tokens.
        answers: ``[B, A, T]`` bool, the answer's tokens.
        about: ``[B, A]`` int64, the number of the passage with the answer; ``NO_SOURCE`` where it was never told.
    """

    memory: BatchedStreams
    texts: Tensor
    queries: Tensor
    answers: Tensor
    about: Tensor

    def right(self, logits: Tensor) -> Tensor:
        """Return ``[B, A]`` bool: which questions were answered right."""
        return right_answers(logits, self.texts, self.answers)


@define(eq=False)
class StreamWay:
    """A way of reading streams.

    Attributes:
        selector: brings long-term rows back; None: none are read.
        oracle: bring back those that the answer was written to.
    """

    selector: RowSelector | None = None
    oracle: bool = False

    def chosen(self, moment: StreamMoment) -> RowSelector | None:
        """Return what brings rows back for these questions."""
        return OracleSelector(moment.about) if self.oracle else self.selector


def bytes_of_short_term(streams: BatchedStreams) -> int:
    """Return the bytes of one stream's short-term rows, source and birth included."""
    layout = streams.layout
    row = layout.hidden_size * layout.dtype.itemsize + 2 * ID_BYTES
    return layout.layers * streams.rows * row


def bytes_of_long_term(streams: BatchedStreams) -> int:
    """Return the bytes of one stream's long-term rows: hidden, retriever key, source and birth."""
    layout = streams.layout
    row = (layout.hidden_size + layout.key_size) * layout.dtype.itemsize + 2 * ID_BYTES
    return sum(rows.count * row for rows in streams.ltm)


def right_answers(logits: Tensor, texts: Tensor, answers: Tensor) -> Tensor:
    """Return ``[...]`` bool: every token of the answer is the most probable one, as greedy decoding has it.

    Args:
        logits: ``[..., T, V]``.
        texts: ``[..., T]`` int64, question and answer.
        answers: ``[..., T]`` bool, the answer's tokens.
    """
    said = logits[..., :-1, :].argmax(-1)
    return ((said == texts[..., 1:]) | ~answers[..., 1:]).all(-1)
