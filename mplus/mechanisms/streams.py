"""TrainingStreams: the memories of many streams, written and read together and with gradients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from attrs import define
from torch import Tensor

from mplus.errors import ConfigError
from mplus.mechanisms.decoder import Adapter
from mplus.memory.writing.update import Update

CHOICES = 1 << 40
"""Between the seeds of a stream's two generators."""

Candidates = Callable[[int, Tensor], Tensor]
"""``candidates(layer, sources [B, n + m])`` -> ``[B, c]`` int64: positions of the rows, those that every read sees
before those that retrieval chooses from, that a retriever loss wants to score."""


@define(eq=False)
class LayerRead:
    """The texts of one layer, and the rows that it read for them.

    Attributes:
        text: ``[B, R, T, d]``, the texts after the layer's input norm, with their graph.
        searched_source: ``[B, m]`` int64, the sources of the rows that retrieval chose from; None where it did not.
        selected: ``[B, R, k]`` int64, positions of the retrieved rows among these, oldest first.
        selected_source: ``[B, R, k]`` int64, the sources of the retrieved rows.
        scores: ``[B, R, k]``, the scores they were chosen by.
        candidate_index: ``[B, c]`` int64, the positions that a retriever loss asked for; None where it did not.
        candidates: ``[B, c, d]``, the rows there, after the input norm.
        candidate_source: ``[B, c]`` int64.
        recent: ``[B, K, d]``, the newest rows after the input norm, for a retriever loss.
        recent_source: ``[B, K]`` int64.
    """

    text: Tensor
    searched_source: Tensor | None = None
    selected: Tensor | None = None
    selected_source: Tensor | None = None
    scores: Tensor | None = None
    candidate_index: Tensor | None = None
    candidates: Tensor | None = None
    candidate_source: Tensor | None = None
    recent: Tensor | None = None
    recent_source: Tensor | None = None


@define(frozen=True, eq=False)
class Read:
    """Logits ``[B, R, T, V]`` of texts, or of their last tokens, and what each layer with memory read for them."""

    logits: Tensor
    layers: dict[int, LayerRead]


class TrainingStreams(ABC):
    """The memories of B streams of one mechanism, each with a seed of its own.

    Rows may carry the graph of the pass that made them, until ``detach``.

    Example:
        >>> streams.write(chunks, sources)  # chunks [B, n], sources [B]
        >>> loss = cross_entropy(streams.read(texts).logits[:, :, :-1].flatten(0, 2), labels.flatten())
        >>> loss.backward()
        >>> streams.detach()

    Attributes:
        numbers: global number of each stream; seeds its draws, so a stream does the same in every process layout.
        clock: rows written so far per layer.
        generators: of each stream, for what its mechanism draws.
        choices: of each stream, for what a loss draws.
    """

    clock: int

    def __init__(self, numbers: Sequence[int], seed: int) -> None:
        if not numbers:
            raise ConfigError(f"{type(self).__name__} must have at least one stream, got none")
        self.numbers = tuple(numbers)
        self.generators = [torch.Generator().manual_seed(seed + number) for number in numbers]
        self.choices = [torch.Generator().manual_seed(seed + number + CHOICES) for number in numbers]

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of all rows."""

    @abstractmethod
    def reset(self) -> None:
        """Forget everything that was written; the generators go on from where they are."""

    @abstractmethod
    def detach(self) -> None:
        """Cut all rows off from the passes that made them."""

    @abstractmethod
    def encode(self, ids: Tensor) -> Update:
        """Make new rows of one chunk ``[B, n]`` of each stream, and change nothing.

        Raises:
            InputError: wrong batch size or chunk length.
        """

    @abstractmethod
    def absorb(self, update: Update, source: Tensor) -> None:
        """Take the new rows of one chunk, written from ``source`` ``[B]`` int64, into every stream."""

    def write(self, ids: Tensor, source: Tensor) -> None:
        """Encode one chunk ``[B, n]`` from ``source`` ``[B]`` int64 and absorb it."""
        self.absorb(self.encode(ids), source)

    @abstractmethod
    def read(
        self,
        texts: Tensor,
        *,
        queries: Tensor | None = None,
        candidates: Candidates | None = None,
        logits_to_keep: int = 0,
    ) -> Read:
        """Read R texts of each stream, independently of each other, as a user's memory is read. Changes nothing.

        Args:
            texts: ``[B, R, T]`` int64, padding on the right.
            queries: ``[B, R, T]`` bool, the tokens that retrieval sees; None: all.
            candidates: chooses rows for a retriever loss.
            logits_to_keep: compute the logits of so many last tokens only; 0: of all.

        Raises:
            NotSupported: ``candidates``, where the streams offer none.
        """

    @abstractmethod
    def read_update(self, update: Update, texts: Tensor, adapter: Adapter) -> Read:
        """Read texts ``[B, R, T]`` from memories that hold nothing but ``update``, with one of the LoRA adapters."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return everything the streams remember, as tensors and plain data. Gradients are not kept."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state. Raises ConfigError when it has another number of streams or layers."""

    def generator_states(self) -> dict[str, list[Tensor]]:
        """Return the states of all generators, as ``load_generator_states`` takes them back."""
        return {name: [each.get_state() for each in getattr(self, name)] for name in ("generators", "choices")}

    def load_generator_states(self, state: Mapping[str, Sequence[Tensor]]) -> None:
        """Set all generators to saved states."""
        for name in ("generators", "choices"):
            for generator, saved in zip(getattr(self, name), state[name], strict=True):
                generator.set_state(saved.cpu())
