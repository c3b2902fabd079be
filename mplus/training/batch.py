"""Batch: what a batch of streams writes and reads in one training step, and where batches come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from attrs import define
from torch import Tensor

IGNORE_INDEX = -100
"""Label of a token that is not predicted, as in transformers."""

NO_SOURCE = -1
"""Source of a text that nothing was written about."""


@define(frozen=True, eq=False, kw_only=True)
class Batch:
    """B streams write C chunks each, then read R texts each.

    Attributes:
        chunks: ``[B, C, n]`` int64, written in this order; C may be 0.
        sources: ``[B, C]`` int64, what each chunk tells of. A number means the same thing in every stream, and a
            stream does not write it again before it starts anew, unless the chunks belong together.
        texts: ``[B, R, T]`` int64, read after the chunks were written, independently of each other.
        labels: ``[B, R, T]`` int64: the token itself where it is predicted from those before it, else ``IGNORE_INDEX``.
        mask: ``[B, R, T]`` bool, False at padding, which is on the right.
        text_sources: ``[B, R]`` int64: the source a text continues or asks for; ``NO_SOURCE`` where none was written.
        query_mask: ``[B, R, T]`` bool: the tokens that retrieval may see, so that it does not look at what is to be
            predicted; None: all that ``mask`` leaves.
        answer_mask: ``[B, R, T]`` bool: the labels that accuracy is about; None: all of them.
        reset: every stream forgets all before this batch.
        windows: ``[B, S]`` int64: the newest chunks and a text as one plain text, for objectives without memory; or
            None where the source has none. The label of padding is ``IGNORE_INDEX``.
        window_labels: ``[B, S]`` int64, as ``labels``.
        window_mask: ``[B, S]`` bool, False at padding.
    """

    chunks: Tensor
    sources: Tensor
    texts: Tensor
    labels: Tensor
    mask: Tensor
    text_sources: Tensor
    query_mask: Tensor | None = None
    answer_mask: Tensor | None = None
    reset: bool = False
    windows: Tensor | None = None
    window_labels: Tensor | None = None
    window_mask: Tensor | None = None


class BatchSource(ABC):
    """Makes batches for B streams.

    What stream i gets depends on the seed and on its global number only, not on which process holds it or on the
    other streams, and a source that was restored goes on as the one that was saved would have.
    """

    @abstractmethod
    def next_batch(self, chunks: int = 1, *, repeat: bool = False) -> Batch:
        """Make the next batch.

        Args:
            chunks: C, chunks written by each stream, as far as the data has so many.
            repeat: ask for the chunks themselves rather than for what follows them (repeat task).

        Raises:
            InputError: the source cannot do that (no repeat task, or no text long enough); it names the rule.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return position and random state as plain data and tensors."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position."""
