"""HiddenRetriever: chunks whose hidden states resemble those of the question, in the decoder's own layers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from attrs import define, field
from torch import Tensor
from torch.nn.functional import normalize, pad

from mplus.config import whole
from mplus.retrievers.chunks.base import ChunkDecoder, ChunkRetriever, Chunks, ChunkShape, Query, between
from mplus.retrievers.chunks.statements import statements
from mplus.tokenizer import Tokenizer

BATCH = 16
"""Statements in one pass."""


@define(frozen=True, eq=False)
class Statistics:
    """The mean and spread of the hidden states of a decoder in a few of its layers.

    Massive activations make raw means of all texts alike; per dimension, the mean is taken off them and they are
    divided by the standard deviation.

    Attributes:
        layers: ``[k]`` int64, places in the hidden states.
        chunks: ``[2, k, d]``, mean and standard deviation of passages.
        queries: ``[2, k, d]``, of questions.
        unrelated: ``[2]``, mean and standard deviation of the similarity of a question and a passage that does not
            answer it.
    """

    layers: Tensor
    chunks: Tensor
    queries: Tensor
    unrelated: Tensor

    @staticmethod
    def of(passages: Tensor, questions: Tensor, most: int) -> Statistics:
        """Choose up to ``most`` layers, one by one, in which questions are closest to their own passages.

        Args:
            passages: ``[n, depth + 1, d]``, mean hidden states.
            questions: ``[n, depth + 1, d]``, of a question about each passage.
            most: layers.
        """
        # A dimension that is the same in all statements must not be divided by zero.
        spread = [torch.stack([means.mean(0), means.std(0) + 1e-4]) for means in (passages, questions)]
        found = [standardised(means, one) for means, one in zip((passages, questions), spread, strict=True)]
        similar = torch.einsum("qld,pld->lqp", found[1], found[0])
        layers: list[int] = []
        while len(layers) < min(most, len(similar)):
            others = [layer for layer in range(len(similar)) if layer not in layers]
            layers.append(max(others, key=lambda layer: _margin(similar[[*layers, layer]].mean(0))))
        chosen, wrong = torch.tensor(layers), ~torch.eye(len(passages), dtype=torch.bool)
        scores = similar[chosen].mean(0)[wrong]
        return Statistics(
            chosen, spread[0][:, chosen], spread[1][:, chosen], torch.stack([scores.mean(), scores.std()])
        )

    def flat(self) -> Tensor:
        """Return all of it as one float32 vector."""
        parts = (torch.tensor([len(self.layers)]), self.layers, self.chunks, self.queries, self.unrelated)
        return torch.cat([part.flatten().float() for part in parts])

    def scores(self, query: Tensor, keys: Tensor) -> Tensor:
        """Return how similar each of ``keys`` ``[c, k d]`` is to ``query`` ``[k d]``, ``[c]`` float64."""
        similar = keys.float() @ query.float() / len(self.layers)
        return ((similar - self.unrelated[0]) / self.unrelated[1]).double()

    @staticmethod
    def from_flat(flat: Tensor) -> Statistics:
        """Return what ``flat`` made a vector of."""
        count = int(flat[0])
        layers, rest = flat[1 : count + 1].long(), flat[count + 1 : -2]
        chunks, queries = rest.view(2, 2, count, -1)
        return Statistics(layers, chunks, queries, flat[-2:])


class StatesRetriever(ChunkRetriever):
    """A retriever that compares chunks and questions by their mean hidden states in a few layers of the decoder.

    Its calibration ends with the threshold. Without a tokenizer there is none, so that no keys are kept and no chunk
    is brought back.
    """

    near = 0.25
    collect: ClassVar[frozenset[Literal["hidden"]]] = frozenset({"hidden"})

    def calibrate(self, decoder: ChunkDecoder, tokenizer: Tokenizer) -> Tensor:
        return self.calibrated(decoder, tokenizer)[0]

    @abstractmethod
    def calibrated(self, decoder: ChunkDecoder, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
        """Return what ``calibrate`` does, and the scores ``[n, n]`` float64 of all passages for all questions."""

    @abstractmethod
    def layers_of(self, calibration: Tensor) -> Tensor:
        """Return ``[k]`` int64, the places in the hidden states that are compared."""

    @abstractmethod
    def embedded(self, means: Tensor, calibration: Tensor, *, asked: bool) -> Tensor:
        """Return the keys ``[B, v]`` of mean hidden states ``[B, k, d]``: of questions (``asked``) or of chunks."""

    @abstractmethod
    def similar(self, key: Tensor, chunks: Chunks) -> Tensor:
        """Return the score ``[c]`` float64 of each chunk for the key ``[v]`` of a question."""

    @torch.no_grad()
    def chunk_keys(
        self, ids: Tensor, hidden_states: Sequence[Tensor], calibration: Tensor, tokenizer: Tokenizer | None
    ) -> Tensor:
        if not len(calibration):
            return super().chunk_keys(ids, hidden_states, calibration, tokenizer)
        every = torch.ones_like(ids, dtype=torch.bool)
        means = means_of_tokens(hidden_states, every, self.layers_of(calibration).tolist())
        return self.embedded(means, calibration, asked=False).half()

    @torch.no_grad()
    def query_keys(
        self, ids: Tensor, mask: Tensor, decoder: ChunkDecoder, calibration: Tensor, tokenizer: Tokenizer | None
    ) -> Tensor:
        if not len(calibration):
            return super().query_keys(ids, mask, decoder, calibration, tokenizer)
        layers = self.layers_of(calibration).tolist()
        means = means_of_tokens(decoder.hidden_states(ids, mask), mask, layers)
        return self.embedded(means, calibration, asked=True)

    def scores(self, query: Query, chunks: Chunks) -> Tensor:
        if not compared(chunks):
            return torch.full((len(chunks),), -torch.inf, dtype=torch.float64)
        return self.similar(query.key.cpu(), chunks)

    def threshold(self, chunks: Chunks) -> float:
        return float(chunks.calibration[-1]) if compared(chunks) else 0.0


class HiddenRetriever(StatesRetriever):
    """Scores chunks by the cosine of their mean hidden states with those of the question, both standardised.

    The key of a chunk comes from the pass that writes it, that of a question from a short pass behind the tokens that
    every chunk is written behind. Which layers are compared, and what is subtracted and divided by, comes from
    ``statements()``. A score of 0 is what a passage has for a question that it does not answer, on the average; the
    unit is the standard deviation of such scores. Without a tokenizer there are no statistics, and no keys.

    Example:
        >>> import mplus
        >>> config = mplus.MPlusConfig(mechanism="kv", retriever="hidden")
    """

    @define(frozen=True, kw_only=True)
    class Options(ChunkRetriever.Options):
        """Options of the comparison.

        Attributes:
            layers: how many layers are compared.
        """

        layers: int = field(default=3, validator=whole(1))

    name = "hidden"
    options: Options

    def key_size(self, shape: ChunkShape) -> int:
        return min(self.options.layers, shape.depth + 1) * shape.hidden_size

    def calibrated(self, decoder: ChunkDecoder, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
        texts = statements()
        passages = means_of([one.passage for one in texts], decoder, tokenizer)
        questions = means_of([one.question for one in texts], decoder, tokenizer)
        known = Statistics.of(passages, questions, self.options.layers)
        keys = standardised(passages[:, known.layers], known.chunks).flatten(1)
        asked = standardised(questions[:, known.layers], known.queries).flatten(1)
        similar = torch.stack([known.scores(one, keys) for one in asked])
        return torch.cat([known.flat(), between(similar).float()[None]]), similar

    def layers_of(self, calibration: Tensor) -> Tensor:
        return _statistics(calibration).layers

    def embedded(self, means: Tensor, calibration: Tensor, *, asked: bool) -> Tensor:
        known = _statistics(calibration)
        return standardised(means, known.queries if asked else known.chunks).flatten(1)

    def similar(self, key: Tensor, chunks: Chunks) -> Tensor:
        return _statistics(chunks.calibration).scores(key, chunks.keys)


def compared(chunks: Chunks) -> bool:
    """Return whether chunks have keys that can be compared: those of a stream that began with a tokenizer."""
    return bool(len(chunks.calibration)) and chunks.keys.shape[1] > 0


def _statistics(calibration: Tensor) -> Statistics:
    return Statistics.from_flat(calibration[:-1])  # the last one is the threshold


def means_of(texts: Sequence[str], decoder: ChunkDecoder, tokenizer: Tokenizer) -> Tensor:
    """Return ``[n, depth + 1, d]``, the mean hidden states of texts, read a few at a time, the long ones together."""
    encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    ids = [torch.as_tensor(one) for one in encoded]
    order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
    found: list[Tensor] = []
    for first in range(0, len(order), BATCH):
        some = [ids[place] for place in order[first : first + BATCH]]
        longest = len(some[-1])
        mask = torch.stack([torch.arange(longest) < len(one) for one in some])
        padded = torch.stack([pad(one, (0, longest - len(one))) for one in some])
        states = decoder.hidden_states(padded, mask)
        found.append(means_of_tokens(states, mask, range(len(states))))
    return torch.cat(found)[torch.tensor(order).argsort()]


def means_of_tokens(hidden_states: Sequence[Tensor], mask: Tensor, layers: Sequence[int]) -> Tensor:
    """Return ``[B, k, d]`` float32 on the CPU: the means over the tokens that ``mask`` ``[B, n]`` says are text."""
    found = []
    for layer in layers:
        states = hidden_states[layer].float()
        share = mask.to(states.device)[..., None].float()
        found.append(((states * share).sum(1) / share.sum(1)).cpu())
    return torch.stack(found, 1)


def standardised(means: Tensor, spread: Tensor) -> Tensor:
    """Return ``means`` ``[n, k, d]`` less the mean, over the standard deviation, with length 1 in every layer."""
    return normalize((means - spread[0]) / spread[1], dim=-1)


def _margin(similar: Tensor) -> float:
    """Return how far scores of questions and their own passages are above the others, in standard deviations."""
    wrong = similar[~torch.eye(len(similar), dtype=torch.bool)]
    return float((similar.diag().mean() - wrong.mean()) / wrong.std())
