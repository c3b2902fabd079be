"""DenseRetriever: chunks whose embeddings, by an encoder of sentence-transformers, resemble that of the question."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Protocol, Self

import torch
from attrs import define, field
from torch import Tensor
from torch.nn.functional import normalize

from mplus.config import must_be
from mplus.errors import InputError, MissingDependencyError
from mplus.retrievers.chunks.base import ChunkDecoder, ChunkRetriever, Chunks, ChunkShape, Query, between
from mplus.retrievers.chunks.statements import statements
from mplus.tokenizer import Tokenizer

text = must_be("a text that is not empty", lambda value: isinstance(value, str) and bool(value.strip()))
"""Validator: a text that is not empty."""


class Encoder(Protocol):
    """An encoder of sentence-transformers."""

    def encode(self, sentences: list[str], /, *, convert_to_tensor: bool, show_progress_bar: bool) -> Tensor:
        """Return the embeddings ``[n, v]`` of texts."""

    def get_sentence_embedding_dimension(self) -> int | None:
        """Return v."""


class DenseRetriever(ChunkRetriever):
    """Scores chunks by the cosine of their embeddings with that of the question, made by an encoder of its own.

    Any encoder that ``sentence_transformers.SentenceTransformer`` loads does (``pip install 'mplus[dense]'``). It needs
    a tokenizer of the memory, which makes text of ids. A score of 0 is what a passage has for a question that it does
    not answer, on the average; the unit is the standard deviation of such scores.

    Example:
        >>> import mplus
        >>> config = mplus.MPlusConfig(mechanism="kv", retriever={"name": "dense", "model": "all-MiniLM-L6-v2"})
    """

    @define(frozen=True, kw_only=True)
    class Options(ChunkRetriever.Options):
        """Options of the encoder.

        Attributes:
            model: name or folder of the encoder.
            query_prompt, chunk_prompt: texts in front of questions and of chunks, as some encoders want them.
        """

        model: str = field(default="sentence-transformers/all-MiniLM-L6-v2", validator=text)
        query_prompt: str = ""
        chunk_prompt: str = ""

    name = "dense"
    near = 0.25
    options: Options

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        self._load = encoder_class("chunk retriever 'dense'")

    @cached_property
    def encoder(self) -> Encoder:
        """The encoder, loaded when it is first needed."""
        return self._load(self.options.model)

    def key_size(self, shape: ChunkShape) -> int:
        return int(self.encoder.get_sentence_embedding_dimension() or 0)

    def calibrate(self, decoder: ChunkDecoder, tokenizer: Tokenizer) -> Tensor:
        passages = self._embedded([one.passage for one in statements()], self.options.chunk_prompt)
        questions = self._embedded([one.question for one in statements()], self.options.query_prompt)
        similar = (questions @ passages.T).double()
        wrong = similar[~torch.eye(len(similar), dtype=torch.bool)]
        mean, deviation = wrong.mean(), wrong.std().clamp(min=1e-6)
        return torch.stack([mean, deviation, between((similar - mean) / deviation)]).float()

    def chunk_keys(
        self, ids: Tensor, hidden_states: Sequence[Tensor], calibration: Tensor, tokenizer: Tokenizer | None
    ) -> Tensor:
        if not len(calibration):
            return super().chunk_keys(ids, hidden_states, calibration, tokenizer)
        return self._embedded(_texts(ids, tokenizer), self.options.chunk_prompt).half()

    def query_keys(
        self, ids: Tensor, mask: Tensor, decoder: ChunkDecoder, calibration: Tensor, tokenizer: Tokenizer | None
    ) -> Tensor:
        if not len(calibration):
            return super().query_keys(ids, mask, decoder, calibration, tokenizer)
        asked = [one[own] for one, own in zip(ids, mask, strict=True)]
        return self._embedded(_texts(asked, tokenizer), self.options.query_prompt)

    def scores(self, query: Query, chunks: Chunks) -> Tensor:
        if not len(chunks.calibration) or not chunks.keys.shape[1]:
            return torch.full((len(chunks),), -torch.inf, dtype=torch.float64)
        similar = (chunks.keys.float() @ query.key.float()).double()
        return (similar - float(chunks.calibration[0])) / float(chunks.calibration[1])

    def threshold(self, chunks: Chunks) -> float:
        return float(chunks.calibration[-1]) if len(chunks.calibration) else 0.0

    def _embedded(self, texts: Sequence[str], prompt: str) -> Tensor:
        """Return the embeddings ``[n, v]`` of texts, of length 1."""
        found = self.encoder.encode([prompt + one for one in texts], convert_to_tensor=True, show_progress_bar=False)
        return normalize(found.float().cpu(), dim=-1)

    def __reduce__(self) -> tuple[type[Self], tuple[Options]]:
        return type(self), (self.options,)  # the encoder is loaded again


def _texts(ids: Iterable[Tensor], tokenizer: Tokenizer | None) -> list[str]:
    """Return the texts of ids ``[n]``. Raises InputError: the memory was opened without its tokenizer."""
    if tokenizer is None:
        raise InputError("the chunk retriever 'dense' embeds texts, which takes the tokenizer of the memory: pass it")
    return [str(tokenizer.decode(one, skip_special_tokens=True)) for one in ids]


def encoder_class(user: str) -> Callable[[str], Encoder]:
    """Return ``SentenceTransformer``. Raises MissingDependencyError: it is not installed, which ``user`` needs."""
    try:
        import sentence_transformers
    except ImportError as error:
        raise MissingDependencyError(
            f"{user} needs the package 'sentence_transformers', which is not installed: pip install 'mplus[dense]'",
            name="sentence_transformers",
        ) from error
    encoder: Callable[[str], Encoder] = sentence_transformers.SentenceTransformer
    return encoder
