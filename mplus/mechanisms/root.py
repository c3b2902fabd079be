"""Mechanism: what the life of a memory asks of its mechanism, be it one of rows or one of text."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from attrs import define, field
from torch import Tensor

from mplus.config import PUBLISHED, JsonValue, MPlusConfig
from mplus.errors import InputError, NotSupported
from mplus.eviction.base import EvictionPolicy
from mplus.memory.merging.incoming import Incoming
from mplus.memory.sources.found import FoundText
from mplus.memory.state import StreamState, StreamView
from mplus.memory.writing.update import WriteContext
from mplus.retrievers.base import Retriever
from mplus.stores.base import MemoryStore, StoreLayout, StoreView
from mplus.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@define(frozen=True)
class Absorbed:
    """The effect of a write on a stream.

    Attributes:
        state: the new one.
        dropped, evicted: rows that left the STM and the LTM.
        stayed: by list of rows, per layer, the positions in the old list of the rows that stayed, in order; in the new
            list they come first. Of a list that is left out it is tried whether rows only came behind the old ones. A
            memory in a directory writes down the other rows.
    """

    state: StreamState
    dropped: int
    evicted: int
    stayed: Mapping[str, tuple[Tensor, ...]] = field(factory=dict)


class Columns(Protocol):
    """Makes what rows keep besides hidden states."""

    def project(self, layer: int, hidden: Tensor) -> Tensor:
        """Return ``MemoryRows.projected`` ``[B, n, w]`` of rows ``[B, n, d]``."""

    def keys(self, layer: int, hidden: Tensor) -> Tensor | None:
        """Return retriever keys ``[m, r]`` of rows ``[m, d]``, or None where none are kept."""


class Mechanism(ABC):
    """The rules of one memory, which hold no state of any memory: a ``MemoryMechanism`` or a ``TextMechanism``.

    Attributes:
        name: in configurations and files.
        State: the class of its streams' states.
        sizes: that a config may leave open, as they are where a decoder has positions for them.
        pins: whether rows leave, where any do, as the eviction policy says, so that those of a pinned source can stay.
    """

    @define(frozen=True, kw_only=True)
    class Options:
        """Options of the mechanism (attrs class; the base class has none)."""

        @classmethod
        def defaults(cls, variant: str) -> dict[str, JsonValue]:
            """Option values that differ from the class's own in this variant."""
            return {}

    name: ClassVar[str]
    State: ClassVar[type[StreamState]]
    sizes: ClassVar[Mapping[str, int]] = PUBLISHED
    pins: ClassVar[bool] = True

    @classmethod
    def settle(cls, config: MPlusConfig, room: int | None) -> MPlusConfig | None:
        """Return ``config`` with this mechanism's own numbers for what it leaves open; None: those of M+.

        Args:
            config: as it was given to ``wrap``.
            room: positions of the decoder that memory should take at most; None: there is no limit.

        Raises:
            ConfigError: a field is set that means nothing to this mechanism.
        """
        return None

    @property
    def shortest_text(self) -> int:
        """Tokens of the shortest text that a write makes chunks of at once; a shorter one waits in the stream's tail.

        1, the default: every text is written at once, as chunks of any length up to ``chunk_tokens``. A mechanism with
        another number shows its reads the tail (``StreamState.tail``).
        """
        return 1

    @abstractmethod
    def new_state(self, layout: StoreLayout, columns: Columns | None = None) -> StreamState:
        """Return a fresh stream.

        Args:
            layout: of its rows.
            columns: makes the columns of rows that a stream begins with; None: there are only their hidden states.
        """

    @abstractmethod
    def absorb(self, state: StreamState, update: Any, source: int, context: WriteContext) -> Absorbed:
        """Take what ``write`` made for one stream, from the text of ``source``, into its state and its store."""

    def combine(self, state: Any, other: Incoming, context: WriteContext) -> Absorbed:
        """Take all that a stream of another memory holds into the state and the store of one; see ``Memory.merge``.

        Args:
            state: of the stream that takes it in. Its sources, texts and writes are those of both already, and stay.
            other: the other stream, with the new births and sources of its rows.
            context: of the stream.

        Returns:
            The state of both, with the clock ``other.order.clock``, and how many rows left.

        Raises NotSupported, the default: the mechanism does not say how two of its memories become one.
        """
        raise NotSupported(
            f"memories of the mechanism {self.name!r} cannot be merged, since it does not say how: write the texts of "
            "the other one to this one"
        )

    def with_tokenizer(self, state: StreamState, tokenizer: Tokenizer | None) -> StreamState:
        """Return a stream as it is when a text is written to it through ``tokenizer``; by default as it was.

        Called before every write, with the same result as long as the stream is the same.

        Args:
            state: of the stream.
            tokenizer: of the memory; None: it has none.
        """
        return state

    def calibrate(self, decoder: Any, view: StreamView, tokenizer: Tokenizer | None) -> None:  # noqa: B027 - most need not
        """Find out what memories of a decoder have to know of it, before anything is written; by default nothing.

        Called when a memory is made.

        Args:
            decoder: runs passes.
            view: of a stream of the new memory.
            tokenizer: of the memory; None: it has none.
        """

    def calibrations_known(self) -> dict[str, Tensor]:
        """Return what was found out about the decoder, by a digest of its weights and of the rest that it depends on.

        ``save_pretrained`` keeps it; by default there is nothing.
        """
        return {}

    def take_calibrations(self, known: Mapping[str, Tensor]) -> None:  # noqa: B027 - most have none
        """Take over what ``calibrations_known`` gave for an equal decoder."""

    def save_retriever(self, folder: Path) -> Mapping[str, str]:
        """Write the files that options of the retriever name into a folder, for ``save_pretrained``.

        Returns the name of each there, by the name of the option; by default there are none.
        """
        return {}

    def search(self, decoder: Any, view: StreamView, text: str, k: int, tokenizer: Tokenizer | None) -> list[FoundText]:
        """Return what ``text`` would bring back from a stream, the best first, ``k`` at most; nothing is generated.

        Args:
            decoder: runs passes (of a memory of text, ``Ask``).
            view: of the stream.
            text: the question alone.
            k: at least 1.
            tokenizer: of the memory; None: it has none.

        Raises NotSupported: this mechanism brings back nothing of which that could be said.
        """
        raise NotSupported(
            f"a memory of the mechanism {self.name!r} cannot be searched, since what it brings back depends on more "
            "than a question: generate with output_sources=True to see which sources were read"
        )

    @property
    def keeps_pinned(self) -> bool:
        """Return whether rows of a pinned source stay in memories of this config."""
        return self.pins

    def lifetime(self, eviction: EvictionPolicy) -> float | None:
        """Merges that new long-term rows of a memory under ``eviction`` live; None: they do not expire."""
        return None

    def sync_index(self, store: MemoryStore) -> None:  # noqa: B027 - most keep nothing elsewhere
        """Rows were removed from ``store`` for good: let go of what is kept of them elsewhere."""

    def index_tensors(self, store: StoreView) -> list[dict[str, Tensor]]:
        """Per layer, what an index of these rows can be made of again; {} where there is none."""
        return [{} for _ in range(store.layout.layers)]

    def load_index(  # noqa: B027 - most have no index
        self, store: StoreView, tensors: Sequence[Mapping[str, Tensor]]
    ) -> None:
        """Take over what ``index_tensors`` gave for these rows, or make an index anew."""


class IndexedMechanism(Mechanism):
    """The rules of one memory of rows, with a retriever or without.

    Attributes:
        retriever: the module of that name among the mechanism's own, if there is one, which brings rows back.
    """

    retriever: Retriever | None

    def sync_index(self, store: MemoryStore) -> None:
        """Rows were removed from ``store`` for good: let go of what a retriever keeps of them."""
        if self.retriever is not None:
            self.retriever.sync_index(store)

    def index_tensors(self, store: StoreView) -> list[dict[str, Tensor]]:
        """Per layer, what the retriever's index of these rows can be made of again; {} where there is none."""
        retriever, layers = self.retriever, range(store.layout.layers)
        return [{} if retriever is None else retriever.index_tensors(layer, store) for layer in layers]

    def load_index(self, store: StoreView, tensors: Sequence[Mapping[str, Tensor]]) -> None:
        """Let the retriever take over what ``index_tensors`` gave for these rows, or make its index anew."""
        for layer, found in enumerate(tensors):
            if self.retriever is not None and found:
                try:
                    self.retriever.load_index(layer, store, found)
                except InputError as error:
                    logger.info("the saved index of layer %d is not used, a new one will be made: %s", layer, error)
