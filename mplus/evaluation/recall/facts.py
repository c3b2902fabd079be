"""Telling: streams of facts, and rounds of questions about them at given ages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from attrs import define, field
from torch import Tensor

from mplus.config import flag, number, whole
from mplus.errors import ConfigError
from mplus.facts import words
from mplus.facts.episodes import Episode, draw_facts, make_episode
from mplus.facts.language import Language
from mplus.training.batch import NO_SOURCE

FIRST_STREAM = 1_000_000
"""Evaluation streams are numbered from here on, so that they never are those of a training run."""


def _ages(ages: Iterable[int]) -> tuple[int, ...]:
    return tuple(ages)


@define(frozen=True, kw_only=True)
class Telling:
    """What is told and asked.

    Attributes:
        language: of the checkpoint.
        chunk_tokens, tail: layout of a chunk, as trained.
        ages: chunks told since a fact, ascending.
        streams: independent streams.
        rounds: how often each stream is asked at every age; between two rounds it is told ``between`` more chunks.
        between: see ``rounds``.
        siblings: share of facts about a person of whom something else was told before.
        held_out: tell of people whose two names were never seen together in training.
        seed: of facts, values, fillers and of the draws of which rows leave the STM.
    """

    language: Language = field(factory=Language)
    chunk_tokens: int = field(default=16, validator=whole(8))
    tail: int = field(default=4, validator=whole(0))
    ages: tuple[int, ...] = field(default=(0, 1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128), converter=_ages)
    streams: int = field(default=64, validator=whole(1))
    rounds: int = field(default=16, validator=whole(1))
    between: int = field(default=2, validator=whole(1))
    siblings: float = field(default=0.25, validator=number(0, 1))
    held_out: bool = field(default=False, validator=flag)
    seed: int = field(default=0, validator=whole(0))

    def __attrs_post_init__(self) -> None:
        if not self.ages or list(self.ages) != sorted(set(self.ages)) or self.ages[0] < 0:
            raise ConfigError(f"ages must be different numbers of chunks from 0 on, ascending, got {self.ages}")

    @property
    def chunks(self) -> int:
        """Chunks each stream is told in all."""
        return self.ages[-1] + 1 + self.between * (self.rounds - 1)

    @property
    def questions(self) -> int:
        """Questions at each age."""
        return self.streams * self.rounds

    def episodes(self) -> list[Episode]:
        """What each stream is told."""
        made = []
        for stream in range(self.streams):
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + FIRST_STREAM + stream) % 2**63)
            facts = draw_facts(self.language, self.chunks, self.held_out, self.siblings, generator)
            sizes = {"chunk_tokens": self.chunk_tokens, "tail": self.tail}
            made.append(make_episode(self.language, facts, **sizes, generator=generator))
        return made


@define(frozen=True, eq=False)
class Round:
    """Questions put to every stream at one moment.

    Attributes:
        told: chunks told so far.
        texts: ``[B, A, T]`` int64: the question and its right answer, padded on the right.
        queries: ``[B, A, T]`` bool, the question's tokens.
        answers: ``[B, A, T]`` bool, the answer's tokens.
        about: ``[B, A]`` int64, the fact; ``NO_SOURCE`` where it was never told.
        age: ``[A]`` for each question its age in chunks; empty for untold facts.
    """

    told: int
    texts: Tensor
    queries: Tensor
    answers: Tensor
    about: Tensor
    age: tuple[int, ...]


def rounds(telling: Telling, episodes: Sequence[Episode]) -> Iterator[Round]:
    """The rounds of questions about told facts, one question for each age."""
    for number_ in range(telling.rounds):
        told = telling.ages[-1] + 1 + telling.between * number_
        asked = [[(episode, told - 1 - age) for age in telling.ages] for episode in episodes]
        facts = torch.tensor([[episode.facts[place] for episode, place in row] for row in asked])
        values = [
            [telling.language.value(episode.facts[place], episode.values[place]) for episode, place in row]
            for row in asked
        ]
        yield _round(telling.language, told, facts, values, facts, telling.ages)


def untold_round(telling: Telling, episodes: Sequence[Episode], told: int, count: int, seed: int) -> Round:
    """``count`` questions to each stream about facts it is never told, of people it could have been told of."""
    language = telling.language
    generator = torch.Generator().manual_seed(seed)
    people = language.people[telling.held_out]
    rows = []
    for episode in episodes:
        known = set(episode.facts)
        row: list[int] = []
        while len(row) < count:
            person = people[int(torch.randint(len(people), (1,), generator=generator))]
            fact = int(torch.randint(language.relations, (1,), generator=generator)) * language.names + person
            if fact not in known:
                row.append(fact)
        rows.append(row)
    facts = torch.tensor(rows)
    answers = [[[words.UNKNOWN]] * count for _ in rows]
    return _round(language, told, facts, answers, torch.full_like(facts, NO_SOURCE), ())


def _round(
    language: Language, told: int, facts: Tensor, values: list[list[list[str]]], about: Tensor, age: tuple[int, ...]
) -> Round:
    ids, longest = language.ids, 4 + language.value_tokens
    texts = [
        [[*language.question(fact), *value] for fact, value in zip(row, some, strict=True)]
        for row, some in zip(facts.tolist(), values, strict=True)
    ]
    padded = torch.tensor(
        [[[ids[word] for word in text] + [ids[words.PAD]] * (longest - len(text)) for text in row] for row in texts]
    )
    place = torch.arange(longest).expand_as(padded)
    return Round(told, padded, place < 4, (place >= 4) & (padded != ids[words.PAD]), about, age)
