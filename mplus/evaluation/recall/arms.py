"""The arms: each answers a round of questions in its own way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from attrs import define
from torch import Tensor

from mplus.errors import MissingDependencyError
from mplus.evaluation.recall.facts import Round, Telling
from mplus.evaluation.recall.selection import OraclePicker, RandomPicker, RecencyPicker
from mplus.facts import words
from mplus.facts.episodes import Episode
from mplus.training.batched.read import DenseDecoder, Read
from mplus.training.batched.selection import Picker, ScorePicker
from mplus.training.batched.stream_batch import StreamBatch

ID_BYTES = 8
"""Bytes of a token id that is kept as text."""


@define(frozen=True, eq=False)
class Answered:
    """What an arm made of a round.

    Attributes:
        right: ``[B, A]`` bool; the columns of ages it cannot answer hold nothing.
        can: ``[A]`` bool, the ages it can answer.
        state_bytes: bytes kept per stream.
        attended: rows and tokens in sight of the answer's first token, per layer.
        read: what the layers read, for arms that read memory.
        first: ``[B, A, V]`` logits of the answer's first token.
    """

    right: Tensor
    can: Tensor
    state_bytes: int
    attended: int
    first: Tensor
    read: Read | None = None


class Answerer(ABC):
    """One arm. Raises MissingDependencyError when made without a package it needs."""

    name: ClassVar[str]
    rounds: ClassVar[int | None] = None
    """Rounds it answers, where all of them would take too long; None: all."""

    @abstractmethod
    def answer(
        self, decoder: DenseDecoder, streams: StreamBatch, asked: Round, episodes: Sequence[Episode]
    ) -> Answered:
        """Answer every question of a round; the streams stay as they are."""


class MemoryArm(Answerer):
    """Reads the streams, with long-term rows that a picker brings back, or without any."""

    def __init__(self, name: str, picker: Picker | None, retrieved_tokens: int | None = None) -> None:
        self.name = name  # type: ignore[misc]
        self.picker = picker
        self.retrieved_tokens = retrieved_tokens

    def answer(
        self, decoder: DenseDecoder, streams: StreamBatch, asked: Round, episodes: Sequence[Episode]
    ) -> Answered:
        picker = OraclePicker(asked.about) if self.name == "mplus-oracle" else self.picker
        read = decoder.read(
            streams, asked.texts, queries=asked.queries, picker=picker, retrieved_tokens=self.retrieved_tokens
        )
        right = right_answers(read.logits, asked)
        seen = next(iter(read.layers.values()))
        fetched = 0 if seen.picked is None else seen.picked.shape[2]
        stored = bytes_of_short_term(streams) + (bytes_of_long_term(streams) if picker is not None else 0)
        attended = 1 + fetched + streams.rows + 4
        return Answered(
            right, torch.ones(right.shape[1], dtype=torch.bool), stored, attended, read.logits[:, :, 3], read
        )


class NoMemory(Answerer):
    """The decoder alone, given the question only."""

    name: ClassVar[str] = "none"

    def answer(
        self, decoder: DenseDecoder, streams: StreamBatch, asked: Round, episodes: Sequence[Episode]
    ) -> Answered:
        logits = decoder.plain(asked.texts.flatten(0, 1)).view(*asked.texts.shape, -1)
        right = right_answers(logits, asked)
        return Answered(right, torch.ones(right.shape[1], dtype=torch.bool), 0, 4, logits[:, :, 3])


class TextArm(Answerer):
    """The decoder alone, given some of the told chunks as text in front of the question."""

    @abstractmethod
    def chosen(self, asked: Round, episodes: Sequence[Episode]) -> tuple[Tensor, Tensor]:
        """Text ``[B, A, S]`` to put in front of each question, and which ages ``[A]`` bool that can be done for."""

    @abstractmethod
    def kept_tokens(self, asked: Round, chunk_tokens: int) -> int:
        """Tokens of text kept per stream."""

    def answer(
        self, decoder: DenseDecoder, streams: StreamBatch, asked: Round, episodes: Sequence[Episode]
    ) -> Answered:
        context, can = self.chosen(asked, episodes)
        both = torch.cat([context, asked.texts], 2)[:, can]
        logits = decoder.plain(both.flatten(0, 1))[:, context.shape[2] :]
        logits = logits.view(both.shape[0], both.shape[1], -1, logits.shape[-1])
        whole = logits.new_zeros(*asked.texts.shape, logits.shape[-1])
        whole[:, can] = logits
        kept = ID_BYTES * self.kept_tokens(asked, episodes[0].chunks.shape[1])
        return Answered(right_answers(whole, asked), can, kept, context.shape[2] + 4, whole[:, :, 3])


class Window(TextArm):
    """The last so many tokens of what was told."""

    name: ClassVar[str] = "window"

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def chosen(self, asked: Round, episodes: Sequence[Episode]) -> tuple[Tensor, Tensor]:
        text = torch.stack([episode.chunks[: asked.told].flatten()[-self.tokens :] for episode in episodes])
        return text[:, None].expand(-1, asked.texts.shape[1], -1), torch.ones(asked.texts.shape[1], dtype=torch.bool)

    def kept_tokens(self, asked: Round, chunk_tokens: int) -> int:
        return min(self.tokens, asked.told * chunk_tokens)


class FullContext(TextArm):
    """The newest chunks, as many as fit into the decoder's positions; it can answer at the ages that lie inside."""

    name: ClassVar[str] = "full-context"
    rounds: ClassVar[int | None] = 1

    def __init__(self, positions: int) -> None:
        self.positions = positions

    def chosen(self, asked: Round, episodes: Sequence[Episode]) -> tuple[Tensor, Tensor]:
        size = episodes[0].chunks.shape[1]
        fits = (self.positions - asked.texts.shape[2]) // size
        chunks = min(fits, asked.told)
        text = torch.stack([episode.chunks[asked.told - chunks : asked.told].flatten() for episode in episodes])
        can = torch.tensor([age < chunks for age in asked.age])
        return text[:, None].expand(-1, asked.texts.shape[1], -1), can

    def kept_tokens(self, asked: Round, chunk_tokens: int) -> int:
        return asked.told * chunk_tokens


class BM25(TextArm):
    """The chunks whose words match the question best, oldest first (BM25 over all chunks told)."""

    name: ClassVar[str] = "bm25"
    rounds: ClassVar[int | None] = 4

    def __init__(self, telling: Telling, chunks: int) -> None:
        try:
            import bm25s
        except ImportError as error:
            raise MissingDependencyError("arm 'bm25' needs the package bm25s: pip install 'mplus[eval]'") from error
        self._bm25s = bm25s
        self.chunks = chunks
        self._pad = telling.language.ids[words.PAD]

    def chosen(self, asked: Round, episodes: Sequence[Episode]) -> tuple[Tensor, Tensor]:
        rows = []
        for episode, questions in zip(episodes, asked.texts, strict=True):
            index = self._bm25s.BM25()
            told = episode.chunks[: asked.told]
            index.index([[str(word) for word in chunk] for chunk in told.tolist()], show_progress=False)
            wanted = [[str(word) for word in question[:4].tolist()] for question in questions]
            count = min(self.chunks, asked.told)
            places, _ = index.retrieve(wanted, k=count, show_progress=False)
            rows.append(torch.stack([told[torch.tensor(sorted(map(int, place)))].flatten() for place in places]))
        return torch.stack(rows), torch.ones(asked.texts.shape[1], dtype=torch.bool)

    def kept_tokens(self, asked: Round, chunk_tokens: int) -> int:
        return asked.told * chunk_tokens


def right_answers(logits: Tensor, asked: Round) -> Tensor:
    """``[B, A]`` bool: every token of the answer is the most probable one, hence what greedy decoding says."""
    said = logits[:, :, :-1].argmax(-1)
    return ((said == asked.texts[:, :, 1:]) | ~asked.answers[:, :, 1:]).all(2)


def bytes_of_short_term(streams: StreamBatch) -> int:
    """Bytes of one stream's short-term rows, source and birth included."""
    columns = (*streams.stm, *streams.stm_source, *streams.stm_birth)
    return sum(column[0].numel() * column.element_size() for column in columns)


def bytes_of_long_term(streams: StreamBatch) -> int:
    """Bytes of one stream's long-term rows: hidden, retriever key, source and birth."""
    layout = streams.engine.layout
    row = (layout.hidden_size + layout.key_size) * layout.dtype.itemsize + 2 * ID_BYTES
    return sum(rows.count * row for rows in streams.ltm)


def memory_arms(model: Any, seed: int) -> list[Answerer]:
    """The arms that read the streams with the checkpoint's own weights."""
    retriever = model.mplus_engine.mechanism.additions.retriever
    return [
        MemoryArm("memoryllm", None),
        MemoryArm("mplus", ScorePicker(retriever)),
        MemoryArm("mplus-random", RandomPicker(torch.Generator().manual_seed(seed))),
        MemoryArm("mplus-recency", RecencyPicker()),
        MemoryArm("mplus-oracle", None),
    ]
