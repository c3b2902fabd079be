"""RecallBatches: facts are told chunk by chunk, and asked for at chosen ages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict, cast

import torch
from attrs import define, field
from torch import Tensor

from mplus.config import JsonValue, flag, number, one_of, structure, whole
from mplus.errors import ConfigError, InputError
from mplus.facts.episodes import Episode, draw_facts, make_episode
from mplus.facts.language import PAD, UNKNOWN, Language
from mplus.training.batch import IGNORE_INDEX, NO_SOURCE, Batch, BatchSource, Saved
from mplus.training.data.tokens import Tokenizer


def _language(value: Language | Mapping[str, JsonValue]) -> Language:
    return structure(Language, value) if isinstance(value, Mapping) else value


@define(frozen=True, kw_only=True)
class RecallOptions:
    """Options of data in the little language: sizes, and how facts are told and asked for.

    Attributes:
        language: sizes of the language.
        chunk_tokens: tokens of a chunk; one sentence among fillers.
        tail: fillers at the end of a chunk, where its rows are made (K).
        episode: chunks a stream is told before it starts anew.
        questions: R, questions per batch.
        ages: which facts are asked for, by the chunks told since: "all" of the batch's own in order, "recent"
            (exponential), "uniform" over the episode, or "mixed" (half recent, half uniform). But for "all", the first
            question is about the newest chunk.
        mean_age: mean of the exponential, in chunks.
        siblings: share of facts about a person of whom something else was told before.
        one_relation: all facts of an episode are of one relation, so that the names alone tell them apart; without it
            a decoder that has learnt nothing yet is content with telling relations apart.
        unknown: share of questions whose fact was not told; the answer is the word "unknown".
        held_out: tell of people never seen in training.
        name_labels: also predict the names in a question, which helps to get started.
        window_tokens: tokens of plain text in front of a question in ``Batch.windows``; 0: no windows.
    """

    language: Language = field(factory=Language, converter=_language)
    chunk_tokens: int = field(default=16, validator=whole(8))
    tail: int = field(default=4, validator=whole(0))
    episode: int = field(default=24, validator=whole(1))
    questions: int = field(default=4, validator=whole(1))
    ages: Literal["all", "recent", "uniform", "mixed"] = field(
        default="recent", validator=one_of("all", "recent", "uniform", "mixed")
    )
    mean_age: float = field(default=5.0, validator=number(0.01))
    siblings: float = field(default=0.25, validator=number(0, 1))
    one_relation: bool = field(default=False, validator=flag)
    unknown: float = field(default=0.0, validator=number(0, 1))
    held_out: bool = field(default=False, validator=flag)
    name_labels: bool = field(default=False, validator=flag)
    window_tokens: int = field(default=0, validator=whole(0))

    def __attrs_post_init__(self) -> None:
        room = self.chunk_tokens - self.tail
        if room < self.language.sentence_tokens:
            raise ConfigError(
                f"chunk_tokens - tail must be at least the {self.language.sentence_tokens} tokens of a sentence, "
                f"got {self.chunk_tokens} - {self.tail}"
            )
        if self.window_tokens % self.chunk_tokens:
            raise ConfigError(
                f"window_tokens must be a multiple of chunk_tokens ({self.chunk_tokens}), got {self.window_tokens}"
            )


class _Position(TypedDict):
    told: int
    episodes: list[tuple[list[int], list[int], Tensor]]
    generators: list[Tensor]


class RecallBatches(BatchSource):
    """Streams of facts in the little language; see ``BatchSource``. Fresh whenever an episode is over."""

    Options = RecallOptions

    def __init__(
        self, options: RecallOptions, *, tokenizer: Tokenizer | None, numbers: Sequence[int], seed: int
    ) -> None:
        """``tokenizer`` must be that of the language, or None to take its ids on trust.

        Raises:
            ConfigError: the tokenizer knows other words.
        """
        self.options = options
        language = options.language
        if tokenizer is not None:
            known = tokenizer.get_vocab()
            if any(known.get(word) != place for place, word in enumerate(language.vocabulary)):
                raise ConfigError("data of kind 'recall' needs the tokenizer of the little language: set it in [model]")
        # So far apart that no two of neighbouring seeds and streams are equal.
        self._generators = [torch.Generator().manual_seed(seed * 1_000_003 + stream) for stream in numbers]
        self._episodes: list[Episode] = []
        self._told = options.episode
        self._id = language.ids

    def next_batch(self, chunks: int = 1, *, repeat: bool = False) -> Batch:
        """Tell ``chunks`` facts and ask ``questions`` of them.

        Raises:
            InputError: ``repeat``, which facts have no use for; or more chunks than an episode has.
        """
        options = self.options
        if repeat:
            raise InputError("data of kind 'recall' has no repeat task: take another objective")
        if not 1 <= chunks <= options.episode:
            raise InputError(f"a batch of this data must have 1 to episode ({options.episode}) chunks, got {chunks}")
        reset = self._told + chunks > options.episode
        if reset:
            self._begin()
        first, self._told = self._told, self._told + chunks
        ages = [self._ages(generator, chunks) for generator in self._generators]
        asked = [
            self._asked(generator, episode, row)
            for generator, episode, row in zip(self._generators, self._episodes, ages, strict=True)
        ]
        texts = torch.tensor([[self._text(fact, answer) for fact, _, answer in row] for row in asked])
        labels, answer_mask = self._labels(texts)
        windows: dict[str, Tensor] = {} if not options.window_tokens else self._windows()
        return Batch(
            chunks=torch.stack([episode.chunks[first : self._told] for episode in self._episodes]),
            sources=torch.tensor([episode.facts[first : self._told] for episode in self._episodes]),
            texts=texts,
            labels=labels,
            mask=texts != self._id[PAD],
            query_mask=torch.arange(texts.shape[2]).expand_as(texts) < 4,
            text_sources=torch.tensor([[source for _, source, _ in row] for row in asked]),
            answer_mask=answer_mask,
            reset=reset,
            **windows,
        )

    def _begin(self) -> None:
        options = self.options
        self._told = 0
        self._episodes = []
        for generator in self._generators:
            chosen = (options.held_out, options.siblings, generator, options.one_relation)
            facts = draw_facts(options.language, options.episode, *chosen)
            sizes = {"chunk_tokens": options.chunk_tokens, "tail": options.tail}
            self._episodes.append(make_episode(options.language, facts, **sizes, generator=generator))

    def _ages(self, generator: torch.Generator, chunks: int) -> list[int]:
        options = self.options
        if options.ages == "all":
            return list(range(chunks - 1, -1, -1))[: options.questions]
        draws = torch.rand(options.questions, generator=generator)
        # Uniform draws made exponential; the logarithm of 0 would be infinite.
        ages = (-draws.clamp(min=1e-6).log() * options.mean_age).long()
        recent = {"recent": len(draws), "uniform": 0, "mixed": len(draws) // 2}[options.ages]
        # The other draws are shares of all that was told.
        ages = torch.where(torch.arange(len(draws)) < recent, ages, (draws * self._told).long())
        ages = ages.clamp(max=self._told - 1)
        ages[0] = 0
        return [int(age) for age in ages]

    def _asked(self, generator: torch.Generator, episode: Episode, ages: list[int]) -> list[tuple[int, int, list[str]]]:
        """For each age: the fact asked for, its source, and the words of the answer."""
        language, found = self.options.language, []
        draws = (
            torch.rand(len(ages), 2, generator=generator).tolist() if self.options.unknown else [[1.0, 0.0]] * len(ages)
        )
        for age, (absent, which) in zip(ages, draws, strict=True):
            place = self._told - 1 - age
            fact = episode.facts[place]
            if absent < self.options.unknown:
                fact = self._untold(episode, int(which * language.facts))
                found.append((fact, NO_SOURCE, [UNKNOWN]))
            else:
                found.append((fact, fact, language.value(fact, episode.values[place])))
        return found

    def _untold(self, episode: Episode, start: int) -> int:
        """Return the first fact from ``start`` on that this episode never tells, of the people it is about."""
        language, told = self.options.language, set(episode.facts)
        for step in range(language.facts):
            fact = (start + step) % language.facts
            if fact not in told and language.held_out(fact) == self.options.held_out:
                return fact
        raise ConfigError(f"questions for untold facts need an episode shorter than all {language.facts} facts")

    def _text(self, fact: int, answer: list[str]) -> list[int]:
        language = self.options.language
        given = [*language.question(fact), *answer]
        given += [PAD] * (4 + language.value_tokens - len(given))
        return [self._id[word] for word in given]

    def _labels(self, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Return labels ``[B, R, T]`` int64 of texts of this shape, and bool: which of them are answers."""
        answer_mask = (torch.arange(texts.shape[2]) >= 4).expand_as(texts) & (texts != self._id[PAD])
        named = torch.arange(texts.shape[2]).expand_as(texts) >= 2
        labelled = answer_mask | named if self.options.name_labels else answer_mask
        labelled = labelled & (texts != self._id[PAD])
        return torch.where(labelled, texts, torch.full_like(texts, IGNORE_INDEX)), answer_mask

    def _windows(self) -> dict[str, Tensor]:
        """Return the newest chunks of each stream as text, with a question about one of them."""
        options, pad = self.options, self._id[PAD]
        seen = min(options.window_tokens // options.chunk_tokens, self._told)
        rows = []
        for generator, episode in zip(self._generators, self._episodes, strict=True):
            place = self._told - 1 - int(torch.randint(seen, (1,), generator=generator))
            text = episode.chunks[self._told - seen : self._told].flatten()
            answer = options.language.value(episode.facts[place], episode.values[place])
            rows.append(torch.cat([text, torch.tensor(self._text(episode.facts[place], answer))]))
        windows = torch.stack(rows)
        mask = windows != pad
        labels, _ = self._labels(windows[:, None, -4 - options.language.value_tokens :])
        before = torch.full((len(rows), windows.shape[1] - labels.shape[2]), IGNORE_INDEX)
        labels = torch.cat([before, torch.where(self._answer_places(labels), labels[:, 0], IGNORE_INDEX)], 1)
        return {"windows": windows, "window_labels": labels, "window_mask": mask}

    @staticmethod
    def _answer_places(labels: Tensor) -> Tensor:
        return torch.arange(labels.shape[2]).expand(labels.shape[0], -1) >= 4

    def state_dict(self) -> dict[str, Saved]:
        return {
            "told": self._told,
            "episodes": cast("Saved", [(e.facts, e.values, e.chunks) for e in self._episodes]),
            "generators": [generator.get_state() for generator in self._generators],
        }

    def load_state_dict(self, state: dict[str, Saved]) -> None:
        position = cast("_Position", state)
        self._told = position["told"]
        self._episodes = [Episode(*saved) for saved in position["episodes"]]
        for generator, saved in zip(self._generators, position["generators"], strict=True):
            generator.set_state(saved)
