"""Engine: the interface of a memory to the decoder that writes it; ``mplus.hf`` provides it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from mplus.config import Component, JsonValue, MPlusConfig
from mplus.errors import MemoryMismatchError
from mplus.memory.sources.found import FoundText
from mplus.memory.state import StreamState, StreamView
from mplus.memory.weights_state import WeightsState
from mplus.memory.writing.passages import Passage
from mplus.memory.writing.update import NewEntries, Update
from mplus.rows import MemoryRows
from mplus.stores.base import StoreLayout
from mplus.tokenizer import Tokenizer


class Engine(Protocol):
    """A wrapped decoder, seen from its memories."""

    config: MPlusConfig
    mechanism: Any  # Mechanism; typed there, because mechanisms build on memory
    writes_text: ClassVar[bool]
    """True if its memories are made of text, and written with ``write_text``."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of memories that are given none; None: these have none."""

    @property
    def layout(self) -> StoreLayout:
        """Sizes, dtype and device of the rows this decoder makes."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of hidden states, hence of rows."""

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary; ids lie in ``[0, vocab_size)``."""

    @property
    def device(self) -> torch.device:
        """The device of input ids."""

    def write(
        self,
        views: Sequence[StreamView],
        ids: Tensor,
        tokenizer: Tokenizer | None = None,
        sources: Sequence[int | None] = (),
        short: bool = False,
    ) -> Update:
        """Let the mechanism make rows of one chunk of each stream.

        Args:
            views: of the streams, equal in ``StreamState.pass_key``.
            ids: ``[B, n]`` int64.
            tokenizer: turns ids into text, if the memory has one.
            sources: for each stream the number of the source that its chunk comes from; None where it is a new one.
            short: the text is shorter than a chunk, and is not to cost the rows of one.
        """

    def write_text(self, views: Sequence[StreamView], passages: Sequence[Passage]) -> NewEntries:
        """Let the mechanism make entries of a passage of each stream, where ``writes_text``.

        Args:
            views: of the streams.
            passages: one of each.
        """

    def search(self, view: StreamView, text: str, k: int, tokenizer: Tokenizer | None) -> list[FoundText]:
        """Let the mechanism say what ``text`` would bring back from a stream; see ``Mechanism.search``."""

    def check_options(self, **given: Component | torch.device | JsonValue) -> None:
        """Raise ConfigError where an argument of ``new_memory``, ``load`` or ``open`` means nothing to the mechanism.

        Args:
            given: by name; None where it was left out.
        """

    def keys(self, part: int, hidden: Tensor) -> Tensor | None:
        """Return the retriever keys ``[m, r]`` of rows ``[m, d]`` of a list, or None when the retriever keeps none."""

    def new_state(self, layout: StoreLayout) -> StreamState:
        """Return a new stream, its rows (of a checkpoint's pool) with all columns of ``layout``."""

    def project(self, part: int, hidden: Tensor) -> Tensor:
        """Return ``MemoryRows.projected`` ``[B, n, w]`` of rows ``[B, n, d]`` of a list.

        Called where the layout has such a column.
        """

    def refresh(self, rows: MemoryRows, part: int) -> MemoryRows:
        """Return rows of a list with everything computed anew from their hidden states."""

    def weights(self, adapters: Sequence[str] | None = None) -> WeightsState:
        """Return the weights that projections and retriever keys are computed with now.

        Args:
            adapters: as they would be with these adapters of the user alone; None: with those that are active.
        """

    def fingerprint(self, saved: Mapping[str, JsonValue] | None = None) -> dict[str, JsonValue]:
        """Return facts a memory depends on, as plain data: decoder, adapters, additions, content-shaping config.

        Args:
            saved: those of a file they are to be compared with, which may be of an older version.
        """


def engine_of(model: nn.Module) -> Engine:
    """Return the engine of a wrapped decoder. Raises MemoryMismatchError for anything else."""
    engine: Engine | None = getattr(model, "mplus_engine", None)
    if engine is None:
        raise MemoryMismatchError(f"a memory needs a decoder wrapped by mplus.wrap, got {type(model).__name__}")
    return engine
