"""Facts: streams of facts of the little language, and questions about them at given ages."""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar

import torch
from attrs import asdict, define, field

from mplus.config import JsonValue, flag, number, whole
from mplus.errors import ConfigError
from mplus.evaluation.options import as_numbers
from mplus.evaluation.tasks.base import Episode, Passage, Question, Task
from mplus.facts.episodes import Episode as Told
from mplus.facts.episodes import draw_facts, make_episode
from mplus.facts.language import UNKNOWN, Language

FIRST_STREAM = 1_000_000
"""Evaluation streams are numbered from here on, so that they never are those of a training run."""

DEVIATIONS = (
    "facts of a generated language instead of SQuAD and NaturalQuestions; all distractors tell facts of the same form",
    "several questions are put to one stream, at several moments, so they are not independent of each other",
    "full-context: only ages that fit into the decoder's positions; it and bm25 are slow and asked in the first rounds",
)


@define(frozen=True, kw_only=True)
class Facts(Task):
    """Tells one fact a passage, and asks every stream for facts of every age, in several rounds.

    Example:
        >>> Facts(ages=(0, 4, 16), streams=8, rounds=4).questions
        32

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
        untold_seed: ask as many questions about facts that no stream is told, drawn with this seed; None: none.
    """

    name: ClassVar[str] = "recall"

    language: Language = field(factory=Language)
    chunk_tokens: int = field(default=16, validator=whole(8))
    tail: int = field(default=4, validator=whole(0))
    ages: tuple[int, ...] = field(default=(0, 1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128), converter=as_numbers)
    streams: int = field(default=64, validator=whole(1))
    rounds: int = field(default=16, validator=whole(1))
    between: int = field(default=2, validator=whole(1))
    siblings: float = field(default=0.25, validator=number(0, 1))
    held_out: bool = field(default=False, validator=flag)
    seed: int = field(default=0, validator=whole(0))
    untold_seed: int | None = field(default=None, validator=whole(0, optional=True))

    def __attrs_post_init__(self) -> None:
        if not self.ages or list(self.ages) != sorted(set(self.ages)) or self.ages[0] < 0:
            raise ConfigError(f"ages must be different numbers of chunks from 0 on, ascending, got {self.ages}")

    @property
    def passages(self) -> int:
        """Return the chunks that each stream is told in all."""
        return self.ages[-1] + 1 + self.between * (self.rounds - 1)

    @property
    def passage_tokens(self) -> int:
        return self.chunk_tokens

    @property
    def untold(self) -> bool:
        return self.untold_seed is not None

    @property
    def answer_tokens(self) -> int:  # type: ignore[override]
        return self.language.value_tokens

    @property
    def questions(self) -> int:
        """Return the number of questions that are asked at each age."""
        return self.streams * self.rounds

    @property
    def deviations(self) -> tuple[str, ...]:
        return DEVIATIONS

    @property
    def chance(self) -> float:
        """Return the mean accuracy of guessing among the values of the relation asked for."""
        shares = [1 / self.language.values(fact) for stream in self.told for fact in stream.facts]
        return sum(shares) / len(shares)

    def settings(self) -> dict[str, JsonValue]:
        plain = asdict(self)
        if self.untold_seed is None:
            del plain["untold_seed"]
        return plain

    @cached_property
    def told(self) -> list[Told]:
        """Return the facts that each stream is told, as their numbers and as ids."""
        streams = []
        for stream in range(self.streams):
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + FIRST_STREAM + stream) % 2**63)
            facts = draw_facts(self.language, self.passages, self.held_out, self.siblings, generator)
            sizes = {"chunk_tokens": self.chunk_tokens, "tail": self.tail}
            streams.append(make_episode(self.language, facts, **sizes, generator=generator))
        return streams

    def episodes(self) -> list[Episode]:
        """Return one episode a stream; with ``untold_seed`` as many questions about facts that it is never told."""
        untold = [[] for _ in self.told] if self.untold_seed is None else self._untold(self.untold_seed)
        return [self._episode(stream, told, untold[stream]) for stream, told in enumerate(self.told)]

    def ids(self, text: str) -> list[int]:
        """Return the ids of words of the language."""
        known = self.language.ids
        return [known[word] for word in text.split()]

    def _episode(self, number_: int, told: Told, untold: list[Question]) -> Episode:
        language = self.language
        names = [" ".join(language.question(fact)) for fact in told.facts]
        values = [" ".join(language.value(*pair)) for pair in zip(told.facts, told.values, strict=True)]
        places = [(end - age, age) for end in self._ends() for age in self.ages]
        asked = [
            Question(prompt=names[place], answers=(values[place],), needs=(place,), after=place, ages=(age,))
            for place, age in places
        ]
        texts = [" ".join(language.vocabulary[id_] for id_ in chunk) for chunk in told.chunks.tolist()]
        passages = tuple(Passage(text=text, source=name) for text, name in zip(texts, names, strict=True))
        return Episode(number=number_, passages=passages, questions=(*asked, *untold))

    def _ends(self) -> list[int]:
        """Return, for each round, the number of the last chunk told before it."""
        return [self.ages[-1] + self.between * round_ for round_ in range(self.rounds)]

    def _untold(self, seed: int) -> list[list[Question]]:
        """Return for each stream, round after round, questions about people it could have been told of."""
        language, people = self.language, self.language.people[self.held_out]
        questions: list[list[Question]] = [[] for _ in self.told]
        for round_, end in enumerate(self._ends()):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + round_)
            for stream, told in enumerate(self.told):
                known, count = set(told.facts), 0
                while count < len(self.ages):
                    person = people[int(torch.randint(len(people), (1,), generator=generator))]
                    fact = int(torch.randint(language.relations, (1,), generator=generator)) * language.names + person
                    if fact not in known:
                        prompt, count = " ".join(language.question(fact)), count + 1
                        questions[stream].append(
                            Question(prompt=prompt, answers=(UNKNOWN,), needs=(), after=end, ages=(0,))
                        )
        return questions
