"""WordRetriever: chunks that share rare words with the question, by BM25."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from attrs import define, field
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from mplus.config import is_number, must_be, number
from mplus.retrievers.chunks.base import ChunkRetriever, Chunks, Query, between
from mplus.retrievers.chunks.bm25 import Background, bm25
from mplus.retrievers.chunks.folding import Folding
from mplus.retrievers.chunks.statements import statements
from mplus.tokenizer import PieceTokenizer, Tokenizer, says_pieces

UNIT = 8.0
"""Score of a chunk that has all words of the question once: about what ``HiddenRetriever`` gives to a similar one."""
WEIGHT = 4.0
"""Chunks for which a text of the background counts, in how rare a word is."""

share = must_be("a number from 0 to 1", lambda value: is_number(value, 0, 1))
"""Validator: a number from 0 to 1."""


@define(frozen=True, eq=False)
class _Known:
    """The words, and how rare they are, of one tokenizer.

    Attributes:
        folding: how its ids make words.
        background: how rare they are.
        similar: ``[n, n]`` float64, scores of the passages of all statements (columns) for their questions (rows).
    """

    folding: Folding
    background: Background
    similar: Tensor
    _words: WeakIdKeyDictionary = field(factory=WeakIdKeyDictionary, init=False)

    def words_of(self, chunks: Chunks) -> tuple[Tensor, Tensor]:
        """Return the words of chunks, ``[m]``, and how many each has, ``[c]``; kept as long as their ids are."""
        kept: tuple[Tensor, tuple[Tensor, Tensor]] | None = self._words.get(chunks.ids)
        # The same ids may be asked for in other chunks.
        if kept is not None and kept[0] is chunks.lengths:
            return kept[1]
        words = self.folding.words(chunks.ids, chunks.lengths)
        self._words[chunks.ids] = chunks.lengths, words
        return words


class WordRetriever(ChunkRetriever):
    """Scores chunks by the words they share with the question (BM25), rare ones more than frequent ones.

    With a tokenizer of transformers, words are runs of letters and digits whatever their case and pieces, and
    ``statements()`` count for how rare they are. Without one, each id is a word, and a chunk that shares none is not
    brought back. No pass of the decoder is run, and nothing is kept of a chunk but its ids. The words of a memory
    take as long to find as to score (5 ms for 100,000 tokens on one core); they are found by the first read of what it
    holds, and kept for the next ones.

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
            pairs: what two words that follow each other in question and chunk count for, beside what each does; 0: not
                looked for. A full name so counts for more than its first and its last name in chunks about others.
        """

        k1: float = field(default=1.5, validator=number(0))
        b: float = field(default=0.75, validator=share)
        pairs: float = field(default=1.0, validator=number(0))

    name = "words"
    near = 0.25
    options: Options

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        self._known: WeakKeyDictionary[PieceTokenizer, _Known] = WeakKeyDictionary()

    def scores(self, query: Query, chunks: Chunks) -> Tensor:
        asked, known = query.ids.cpu(), self._known_of(chunks.tokenizer)
        if known is None:
            return UNIT * self._bm25(chunks.lengths, chunks.ids, asked, None, self.options.pairs)
        words, counts = known.words_of(chunks)
        asked, _ = known.folding.words(asked, torch.tensor([len(asked)]))
        return UNIT * self._bm25(counts, words, asked, known.background, self.options.pairs)

    def threshold(self, chunks: Chunks) -> float:
        known = self._known_of(chunks.tokenizer)
        return 0.0 if known is None else float(between(known.similar))

    def similar(self, tokenizer: Tokenizer | None) -> Tensor:
        """Return the scores ``[n, n]`` of the passages of all statements for their questions; 0 without a tokenizer."""
        known = self._known_of(tokenizer)
        return torch.zeros(1, 1, dtype=torch.float64) if known is None else known.similar

    def _known_of(self, tokenizer: Tokenizer | None) -> _Known | None:
        """Return what is known of a tokenizer; None of one that does not say its pieces, or none."""
        if not says_pieces(tokenizer):
            return None
        found = self._known.get(tokenizer)
        if found is None:
            found = self._known[tokenizer] = self._learned(tokenizer)
        return found

    def _learned(self, tokenizer: PieceTokenizer) -> _Known:
        folding, texts = Folding.of(tokenizer), statements()
        passages, lengths = _words([one.passage for one in texts], folding, tokenizer)
        questions, asked = _words([one.question for one in texts], folding, tokenizer)
        background = Background.of(torch.cat([lengths, asked]), torch.cat([passages, questions]), WEIGHT)
        # Without pairs: questions of statements have the words of their passages, which those of people may not.
        scores = [
            self._bm25(lengths, passages, question, background, pairs=0) for question in questions.split(asked.tolist())
        ]
        return _Known(folding, background, UNIT * torch.stack(scores))

    def _bm25(
        self, lengths: Tensor, words: Tensor, asked: Tensor, background: Background | None, pairs: float
    ) -> Tensor:
        k1, b = self.options.k1, self.options.b
        return bm25(lengths, words, asked, k1, b, background, relative=True, pairs=pairs)

    def __getstate__(self) -> dict[str, Any]:
        # Weak references cannot be pickled; what is known of a tokenizer is found out again.
        return {**self.__dict__, "_known": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _known=WeakKeyDictionary())


def _words(texts: Sequence[str], folding: Folding, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Return the words of texts, ``[m]``, and how many each has, ``[n]``."""
    encoded = [torch.tensor(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
    return folding.words(torch.cat(encoded), torch.tensor([len(ids) for ids in encoded]))
