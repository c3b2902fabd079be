"""WordRetriever: chunks that share rare words with the question, by BM25."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from attrs import define, field
from torch import Tensor

from mplus.config import is_number, must_be, number
from mplus.retrievers.chunks.base import ChunkRetriever, Chunks, Query
from mplus.retrievers.chunks.bm25 import bm25
from mplus.retrievers.chunks.folding import Folding

share = must_be("a number from 0 to 1", lambda value: is_number(value, 0, 1))
"""Validator: a number from 0 to 1."""


class WordRetriever(ChunkRetriever):
    """Scores chunks by the words they share with the question (BM25), rare ones more than frequent ones.

    With a tokenizer of transformers, words are runs of letters and digits whatever their case and pieces; without one,
    each id is a word. A chunk that shares none is not brought back. No pass of the decoder is run, and nothing is kept
    of a chunk but its ids, so that there is no index to be kept in step: to find the words of 100,000 tokens takes 5 ms
    on one core, as long as to score them.

    Example:
        >>> import mplus
        >>> config = mplus.MPlusConfig(mechanism="kv", retriever={"name": "words", "b": 0.5})
    """

    @define(frozen=True, kw_only=True)
    class Options(ChunkRetriever.Options):
        """Options of BM25.

        Attributes:
            k1: how soon further occurrences of a word stop to count.
            b: how much long chunks are held back, 0 to 1.
        """

        k1: float = field(default=1.5, validator=number(0))
        b: float = field(default=0.75, validator=share)

    name = "words"
    options: Options

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        self._foldings: WeakKeyDictionary[Any, Folding] = WeakKeyDictionary()

    def scores(self, query: Query, chunks: Chunks) -> Tensor:
        counts, words, asked = chunks.lengths, chunks.ids, query.ids.cpu()
        if hasattr(chunks.tokenizer, "convert_ids_to_tokens"):
            folding = self._folding(chunks.tokenizer)
            words, counts = folding.words(chunks.ids, chunks.lengths)
            asked, _ = folding.words(asked, torch.tensor([len(asked)]))
        return bm25(counts, words, asked, self.options.k1, self.options.b)

    def _folding(self, tokenizer: Any) -> Folding:
        found = self._foldings.get(tokenizer)
        if found is None:
            found = self._foldings[tokenizer] = Folding.of(tokenizer)
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_foldings": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _foldings=WeakKeyDictionary())
