"""ChunkRetriever: which chunks of a memory have to do with a question, all layers alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal, Protocol

import torch
from attrs import define, field
from torch import Tensor

from mplus.config import JsonValue
from mplus.tokenizer import Tokenizer


@define(frozen=True, kw_only=True)
class ChunkShape:
    """Sizes of a decoder: all its layers, and the width d of hidden states."""

    depth: int
    hidden_size: int


@define(frozen=True, eq=False)
class Chunks:
    """The chunks of one stream, oldest first.

    Attributes:
        lengths: ``[c]`` int64, tokens of each chunk.
        ids: ``[n]`` int32, the tokens of all chunks, one behind the other.
        keys: ``[c, v]``, what ``chunk_keys`` made of each chunk.
        calibration: ``[x]`` float32, what ``calibrate`` returned when the stream was begun; empty where there was no
            tokenizer.
        tokenizer: of the memory, or None.
    """

    lengths: Tensor
    ids: Tensor
    keys: Tensor
    calibration: Tensor = field(factory=lambda: torch.empty(0))
    tokenizer: Tokenizer | None = None

    def __len__(self) -> int:
        return len(self.lengths)


@define(frozen=True, eq=False)
class Query:
    """The question that chunks are retrieved for.

    Attributes:
        ids: ``[q]`` int64, the tokens of the question alone, without a template; at least one.
        key: ``[v]``, what ``query_keys`` made of it.
    """

    ids: Tensor
    key: Tensor


class ChunkDecoder(Protocol):
    """A decoder that reads questions behind the tokens that begin every chunk."""

    @property
    def weights(self) -> str:
        """A digest of its weights."""

    def hidden_states(self, ids: Tensor, mask: Tensor) -> Sequence[Tensor]:
        """Run one pass without memory over ``ids`` ``[B, n]``, padded on the right (``mask`` bool, False there).

        Returns:
            depth + 1 times ``[B, n, d]``: what the first layer receives, and what each layer gives.
        """


class ChunkRetriever(ABC):
    """Scores whole chunks for a question. Built as ``ChunkRetriever(options)``; holds no state of any memory.

    A memory keeps ``chunk_keys`` of a chunk from the pass that writes it, and asks with the key of the question. A
    retriever that needs no keys scores the token ids.

    Attributes:
        name: in configurations.
        collect: what ``chunk_keys`` wants of the pass that writes a chunk: "hidden", or nothing.
        near: scores that differ by no more are near-equal: of such chunks the newer is preferred.

    Example:
        The longest chunk first, whatever is asked:

        >>> import torch
        >>> from mplus.retrievers.chunks import ChunkRetriever, Chunks, Query
        >>> class Longest(ChunkRetriever):
        ...     name = "longest"
        ...
        ...     def scores(self, query, chunks):
        ...         return chunks.lengths.double()
        >>> longest = Longest()
        >>> chunks = Chunks(torch.tensor([3, 5]), torch.arange(8, dtype=torch.int32), torch.empty(2, 0))
        >>> longest.scores(Query(torch.tensor([4]), torch.empty(0)), chunks)
        tensor([3., 5.], dtype=torch.float64)
    """

    @define(frozen=True, kw_only=True)
    class Options:
        """Options of the implementation (attrs class; the base class has none)."""

        @classmethod
        def defaults(cls, variant: str) -> dict[str, JsonValue]:
            """Return option values that differ from the class's own in this variant; by default none."""
            return {}

    name: ClassVar[str]
    collect: ClassVar[frozenset[Literal["hidden"]]] = frozenset()
    near: ClassVar[float] = 0.0

    def __init__(self, options: Options | None = None) -> None:
        self.options = options if options is not None else self.Options()

    def key_size(self, shape: ChunkShape) -> int:
        """Return the width v of the keys that are kept of chunks; 0, the default: there are none."""
        return 0

    @property
    def calibrates(self) -> bool:
        """True where something has to be known of a decoder (``calibrate``)."""
        return type(self).calibrate is not ChunkRetriever.calibrate

    @property
    def files(self) -> Mapping[str, str]:
        """Options that name a file, each with a digest of what that holds; by default none.

        What ``calibrate`` returns is made anew for another content.
        """
        return {}

    def save_files(self, folder: Path) -> Mapping[str, str]:
        """Write what ``files`` are into a folder, for ``save_pretrained``; return the name of each there by option."""
        return {}

    def calibrate(self, decoder: ChunkDecoder, tokenizer: Tokenizer) -> Tensor:
        """Return what has to be known of a decoder to compare texts, as one vector ``[x]`` float32; by default nothing.

        It is kept with the memory, so that its chunks are compared as they were when they were written.

        Args:
            decoder: runs passes over a few texts, 4,000 tokens at most.
            tokenizer: of the memory.
        """
        return torch.empty(0)

    def chunk_keys(
        self, ids: Tensor, hidden_states: Sequence[Tensor], calibration: Tensor, tokenizer: Tokenizer | None
    ) -> Tensor:
        """Return the keys ``[B, v]`` of chunks of equal length; by default there are none, of width 0.

        Args:
            ids: ``[B, n]`` int64.
            hidden_states: of the pass that writes them, depth + 1 times ``[B, n, d]``; () where ``collect`` is empty.
            calibration: ``[x]``, of these streams; empty where there was no tokenizer.
            tokenizer: of the memory, or None.
        """
        return torch.empty(ids.shape[0], 0)

    def query_keys(
        self, ids: Tensor, mask: Tensor, decoder: ChunkDecoder, calibration: Tensor, tokenizer: Tokenizer | None
    ) -> Tensor:
        """Return the keys ``[B, v]`` of questions; by default there are none, of width 0.

        Args:
            ids: ``[B, q]`` int64, padded on the right.
            mask: ``[B, q]`` bool, False at padding.
            decoder: runs a short pass over them.
            calibration: ``[x]``, of the streams that they are asked of.
            tokenizer: of the memory, or None.
        """
        return torch.empty(ids.shape[0], 0)

    @abstractmethod
    def scores(self, query: Query, chunks: Chunks) -> Tensor:
        """Return how much each chunk has to do with the question, ``[c]`` float64 on the CPU, higher is better.

        The score of a chunk may depend on the other chunks that there are, not on those that were forgotten.
        """

    def threshold(self, chunks: Chunks) -> float:
        """Return the score above which a chunk is brought back; by default 0."""
        return 0.0


def between(scores: Tensor) -> Tensor:
    """Return a threshold for scores ``[n, n]`` of questions and passages, of which those of a number belong together.

    It lies in the middle between what 95 % of the best wrong passages have at most, and what 95 % of the right ones
    have at least.
    """
    right = scores.diag()
    wrong = scores.masked_fill(torch.eye(len(scores), dtype=torch.bool), -torch.inf).amax(1)
    return (wrong.quantile(0.95) + right.quantile(0.05)) / 2
