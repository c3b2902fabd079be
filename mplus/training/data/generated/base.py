"""GeneratedBatches: something is told in every chunk of running text, and asked for later."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, cast

import torch
from attrs import define, field
from torch import Tensor

from mplus.config import JsonValue, number, structure, whole
from mplus.errors import ConfigError, InputError
from mplus.training.batch import Batch, BatchSource, Saved, TextSample, Windows, collate
from mplus.training.data.counter_rng import CounterRNG
from mplus.training.data.documents import DocumentList, DocumentOptions, open_documents
from mplus.training.data.options import as_span, share, span
from mplus.training.data.tokens import TokenCache, Tokenizer

SAME_FILLER = 128
"""Chunks that all streams fill from one document, so that few documents are encoded at a time."""

STOPS = (".", "!", "?")


def _documents(value: DocumentOptions | Mapping[str, JsonValue]) -> DocumentOptions:
    return structure(DocumentOptions, value) if isinstance(value, Mapping) else value


@define(frozen=True, kw_only=True)
class GeneratedOptions:
    """Options of generated data: filler, chunk lengths, and how often and how late questions come.

    Attributes:
        filler: documents whose passages fill the chunks (default: the novel that comes with mplus).
        chunk_tokens: of a chunk; one length or a pair ``[least, most]``.
        questions: R, questions per batch. The first is about the newest chunk.
        mean_age: the other ages, in chunks, are exponential with this mean ...
        uniform: ... or, this share of them, uniform over all that may be asked for.
        max_age: nothing told longer ago is asked for.
        min_age: nothing told more recently is asked for, as far as anything else was told; above 0 the first question
            is not about the newest chunk either.
        episode: chunks a stream is told before it starts anew; None: it never does.
        window_tokens: of the plain text of ``Batch.windows``, newest chunks and a question about them; 0: none.
    """

    filler: DocumentOptions = field(factory=lambda: DocumentOptions(shipped="novel"), converter=_documents)
    chunk_tokens: tuple[int, int] = field(default=(128, 128), converter=as_span, validator=span(1))
    questions: int = field(default=4, validator=whole(1))
    mean_age: float = field(default=5.0, validator=number(0.01))
    uniform: float = field(default=0.25, validator=share)
    max_age: int = field(default=64, validator=whole(0))
    min_age: int = field(default=0, validator=whole(0))
    episode: int | None = field(default=None, validator=whole(1, optional=True))
    window_tokens: int = field(default=0, validator=whole(0))

    def __attrs_post_init__(self) -> None:
        if self.min_age > self.max_age:
            raise ConfigError(f"min_age must be at most max_age ({self.max_age}), got {self.min_age}")
        if self.filler.streaming:
            raise ConfigError("filler must be documents of which any can be had at once, got streaming=True")


class GeneratedBatches(BatchSource):
    """Base of sources that tell one thing per chunk; see ``BatchSource``.

    What is told in chunk j of a stream is a function of seed, stream and j, so nothing needs to be kept in order to
    ask for it later. A chunk's source is a number of its own.

    Args:
        options: see ``GeneratedOptions`` and the class itself.
        tokenizer: makes ids of text.
        numbers: global numbers of the streams.
        seed: of everything told and asked.

    Raises:
        ConfigError: chunks too short for what is told, or a window too short for a chunk and a question.
        InputError: no filler as long as a chunk.
    """

    kind: ClassVar[int]
    """Number of the class, 1 to 7, so that its sources are not those of other data."""

    def __init__(self, options: GeneratedOptions, *, tokenizer: Tokenizer, numbers: Sequence[int], seed: int) -> None:
        self.options = options
        self._tokenizer = tokenizer
        self._numbers = list(numbers)
        self._seed = seed
        self._step = self._told = self._begun = 0
        self._cache = TokenCache(tokenizer)
        documents = open_documents(options.filler)
        if not isinstance(documents, DocumentList):
            raise ConfigError("filler must be documents of which any can be had at once, got a streamed dataset")
        self._filler = documents
        told, asked = self.longest()
        if told > options.chunk_tokens[0]:
            raise ConfigError(
                f"chunk_tokens must be at least the {told} of what is told, got {options.chunk_tokens[0]}"
            )
        self._window_chunks = (options.window_tokens - asked) // options.chunk_tokens[1]
        if options.window_tokens and self._window_chunks < 1:
            raise ConfigError(
                f"window_tokens must be 0 or at least chunk_tokens and a question of up to {asked}, "
                f"{options.chunk_tokens[1] + asked}, got {options.window_tokens}"
            )
        stops = [place for token, place in tokenizer.get_vocab().items() if token.endswith(STOPS)]
        self._stops = torch.tensor(sorted(stops), dtype=torch.int64)

    @abstractmethod
    def tell(self, stream: int, place: int) -> Tensor:
        """Return the ids ``[t]`` of the statement in chunk ``place`` of ``stream``."""

    @abstractmethod
    def ask(self, stream: int, place: int, source: int, draws: CounterRNG) -> TextSample:
        """Return a question for that statement, with its answer; ``source`` is that of its chunk."""

    @abstractmethod
    def longest(self) -> tuple[int, int]:
        """Return the most tokens that ``tell`` and ``ask`` can have."""

    def next_batch(self, chunks: int = 1, *, repeat: bool = False) -> Batch:
        options, draws = self.options, CounterRNG(self._seed, "lengths", self._step)
        if repeat:
            raise InputError("generated data has no repeat task: take another objective, or data of kind 'documents'")
        if options.episode is not None and chunks > options.episode:
            raise InputError(f"a batch of this data must have at most episode ({options.episode}) chunks, got {chunks}")
        if self._told == self._begun and not chunks:
            raise InputError("the first batch of this data must have at least 1 chunk, got 0: nothing can be asked yet")
        reset = options.episode is not None and self._told - self._begun + chunks > options.episode
        if reset:
            self._begun = self._told
        first, self._told = self._told, self._told + chunks
        size = draws.between(*options.chunk_tokens)
        places = range(first, self._told)
        asked = [self._questions(stream) for stream in self._numbers]
        windows = self._windows(size) if options.window_tokens else None
        self._step += 1
        written = [[self._chunk(stream, place, size) for place in places] for stream in self._numbers]
        sources = [[self._source(stream, place) for place in places] for stream in self._numbers]
        return collate(written, sources, asked, size, windows, reset=reset)

    def state_dict(self) -> dict[str, Saved]:
        return {"batch": self._step, "told": self._told, "begun": self._begun}

    def load_state_dict(self, state: dict[str, Saved]) -> None:
        counts = cast("dict[str, int]", state)
        self._step, self._told, self._begun = counts["batch"], counts["told"], counts["begun"]

    def _source(self, stream: int, place: int) -> int:
        # In 63 bits, and above the numbers of documents, so that data of several kinds can be mixed in one stream.
        return self.kind << 60 | (stream + 1) << 32 | place

    def _questions(self, stream: int) -> list[TextSample]:
        options, draws = self.options, CounterRNG(self._seed, "ages", stream, self._step)
        oldest = min(options.max_age, self._told - self._begun - 1)
        newest = min(options.min_age, oldest)
        ages = [newest]
        while len(ages) < options.questions:
            if draws.uniform() < options.uniform:
                ages.append(newest + draws.below(oldest - newest + 1))
            else:
                # The inverse of the exponential distribution; 1 - u is never 0.
                ages.append(min(oldest, newest + int(-math.log(1 - draws.uniform()) * options.mean_age)))
        return [self._question(stream, self._told - 1 - age, draws) for age in ages]

    def _question(self, stream: int, place: int, draws: CounterRNG) -> TextSample:
        return self.ask(stream, place, self._source(stream, place), draws)

    def _chunk(self, stream: int, place: int, size: int) -> Tensor:
        """Return ``[size]`` ids: the statement between two sentences of the filler, where it has any end of one."""
        told = self.tell(stream, place)
        if len(told) > size:
            raise InputError(f"what is told has {len(told)} tokens and chunk_tokens is {size}: raise chunk_tokens")
        draws = CounterRNG(self._seed, "filler", stream, place)
        filler = self._passage(place, size - len(told), draws)
        ends = torch.isin(filler, self._stops).nonzero()[:, 0] + 1
        cut = int(ends[draws.below(len(ends))]) if len(ends) else draws.below(len(filler) + 1)
        return torch.cat([filler[:cut], told, filler[cut:]])

    def _passage(self, place: int, size: int, draws: CounterRNG) -> Tensor:
        """Return ``[size]`` adjacent tokens of a document."""
        choice = CounterRNG(self._seed, "document", place // SAME_FILLER)
        for _ in range(2 * self._filler.count + 10):
            index = choice.below(self._filler.count)
            ids = self._cache.ids(index, self._filler[index])
            if len(ids) >= size:
                start = draws.below(len(ids) - size + 1)
                return ids[start : start + size]
        raise InputError(f"filler must have documents of at least {size} tokens, got {self._filler.count} shorter ones")

    def _windows(self, size: int) -> Windows:
        """Return the newest chunks and a question about one of them."""
        count = min(self._window_chunks, self._told - self._begun)
        past, texts = [], []
        for stream in self._numbers:
            places = range(self._told - count, self._told)
            draws = CounterRNG(self._seed, "window", stream, self._step)
            past.append(torch.cat([self._chunk(stream, place, size) for place in places]))
            texts.append(self._question(stream, places[draws.below(count)], draws))
        return Windows(self.options.window_tokens, past, whole=False, texts=texts)
