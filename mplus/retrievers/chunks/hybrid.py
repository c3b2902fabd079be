"""HybridRetriever: words and hidden states together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

import torch
from attrs import define, field
from torch import Tensor

from mplus.config import number, whole
from mplus.retrievers.chunks.base import ChunkDecoder, ChunkRetriever, Chunks, ChunkShape, Query, between
from mplus.retrievers.chunks.hidden import HiddenRetriever, compared
from mplus.retrievers.chunks.trained import TrainedRetriever
from mplus.retrievers.chunks.words import WordRetriever, share
from mplus.tokenizer import Tokenizer


class HybridRetriever(ChunkRetriever):
    """Adds the scores of "words" and "hidden", whose units are alike: names and numbers, and what a text is about.

    With ``path`` the maps of ``mplus train-retriever`` compare hidden states, as "trained" does.

    Without a tokenizer there is nothing to compare hidden states by, and it scores as "words" does.

    Example:
        >>> import mplus
        >>> config = mplus.MPlusConfig(mechanism="kv", retriever={"name": "hybrid", "layers": 2})
    """

    @define(frozen=True, kw_only=True)
    class Options(ChunkRetriever.Options):
        """Options of both.

        Attributes:
            k1, b, pairs: of BM25, as of "words".
            layers: how many layers are compared, as of "hidden".
            path: the file of "trained", which then takes the place of "hidden"; its layers are those of the training.
        """

        k1: float = field(default=1.5, validator=number(0))
        b: float = field(default=0.75, validator=share)
        pairs: float = field(default=1.0, validator=number(0))
        layers: int = field(default=3, validator=whole(1))
        path: str | None = None

    name = "hybrid"
    collect: ClassVar[frozenset[Literal["hidden"]]] = HiddenRetriever.collect
    near = 0.25
    options: Options

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        self.words = WordRetriever(
            WordRetriever.Options(k1=self.options.k1, b=self.options.b, pairs=self.options.pairs)
        )
        self.hidden: HiddenRetriever | TrainedRetriever
        if self.options.path is None:
            self.hidden = HiddenRetriever(HiddenRetriever.Options(layers=self.options.layers))
        else:
            self.hidden = TrainedRetriever(TrainedRetriever.Options(path=self.options.path))

    @property
    def files(self) -> Mapping[str, str]:
        return self.hidden.files

    def save_files(self, folder: Path) -> Mapping[str, str]:
        return self.hidden.save_files(folder)

    def key_size(self, shape: ChunkShape) -> int:
        return self.hidden.key_size(shape)

    def calibrate(self, decoder: ChunkDecoder, tokenizer: Tokenizer) -> Tensor:
        found, similar = self.hidden.calibrated(decoder, tokenizer)
        return torch.cat([found[:-1], between(similar + self.words.similar(tokenizer)).float()[None]])

    def chunk_keys(
        self, ids: Tensor, hidden_states: Sequence[Tensor], calibration: Tensor, tokenizer: Tokenizer | None
    ) -> Tensor:
        return self.hidden.chunk_keys(ids, hidden_states, calibration, tokenizer)

    def query_keys(
        self, ids: Tensor, mask: Tensor, decoder: ChunkDecoder, calibration: Tensor, tokenizer: Tokenizer | None
    ) -> Tensor:
        return self.hidden.query_keys(ids, mask, decoder, calibration, tokenizer)

    def scores(self, query: Query, chunks: Chunks) -> Tensor:
        by_words = self.words.scores(query, chunks)
        return by_words + self.hidden.scores(query, chunks) if compared(chunks) else by_words

    def threshold(self, chunks: Chunks) -> float:
        return self.hidden.threshold(chunks) if compared(chunks) else self.words.threshold(chunks)
