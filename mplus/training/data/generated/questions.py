"""QuestionBatches: facts about people are told in running text, and asked for later."""

from __future__ import annotations

from functools import cached_property

from attrs import define, field
from torch import Tensor

from mplus.config import flag
from mplus.errors import ConfigError
from mplus.facts.language import FIRST_NAMES, HELD_OUT, LAST_NAMES, UNKNOWN, VALUES
from mplus.training.batch import NO_SOURCE, TextSample
from mplus.training.data.counter_rng import CounterRNG, permuted
from mplus.training.data.generated.base import GeneratedBatches, GeneratedOptions
from mplus.training.data.generated.copying import shared
from mplus.training.data.options import share
from mplus.training.data.tokens import encode

RELATIONS = {"colour": "favourite colour", "town": "home town", "pet": "pet", "fruit": "favourite fruit"}
"""Key of ``VALUES`` -> what it is called in a sentence."""

STATEMENTS = (
    "The {relation} of {name} is {value}.",
    "{name}'s {relation} is {value}.",
    "Everybody knew that the {relation} of {name} was {value}.",
    "{name} said: My {relation} is {value}.",
)
QUESTIONS = (
    "Question: What is the {relation} of {name}? Answer: {value}.",
    "Question: What is {name}'s {relation}? Answer: {value}.",
    "The {relation} of {name} is {value}.",
)


@define(frozen=True, kw_only=True)
class QuestionOptions(GeneratedOptions):
    """Options of ``GeneratedOptions`` and these.

    Attributes:
        held_out: tell of people whose names never come together otherwise: one pair of names in five.
        unknown: of the questions that would not be about the newest chunk, this share asks for a fact that was not
            told; the answer is "unknown".
        label_question: also predict the question's words, which helps a decoder from nothing to get started.
    """

    held_out: bool = field(default=False, validator=flag)
    unknown: float = field(default=0.0, validator=share)
    label_question: bool = field(default=False, validator=flag)

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        most = len(people(held_out=self.held_out)) * len(RELATIONS) // 2
        if self.max_age >= most:
            raise ConfigError(f"max_age must be below {most}, so that no fact is told twice, got {self.max_age}")


def people(*, held_out: bool) -> list[str]:
    """Return full names; one pair in five is held out."""
    return [
        f"{first.capitalize()} {last.capitalize()}"
        for row, first in enumerate(FIRST_NAMES)
        for column, last in enumerate(LAST_NAMES)
        if ((row + column) % HELD_OUT == HELD_OUT - 1) == held_out
    ]


class QuestionBatches(GeneratedBatches):
    """``The pet of Anna Bell is fox.`` tells in one of several ways, a question with its answer asks in another.

    A fact comes back, with a new value, only after all other facts about the people of this data set.
    """

    Options = QuestionOptions
    kind = 2
    options: QuestionOptions

    @cached_property
    def _people(self) -> list[str]:
        return people(held_out=self.options.held_out)

    def fact(self, stream: int, place: int) -> tuple[str, str, str]:
        """Return relation, name and value told in a chunk."""
        count = len(self._people) * len(RELATIONS)
        relation, person = divmod(permuted(place % count, count, self._seed, "facts", stream), len(self._people))
        key = list(RELATIONS)[relation]
        values = VALUES[key]
        value = values[CounterRNG(self._seed, "value", stream, place).below(len(values))]
        return RELATIONS[key], self._people[person], value

    def tell(self, stream: int, place: int) -> Tensor:
        relation, name, value = self.fact(stream, place)
        template = STATEMENTS[CounterRNG(self._seed, "statement", stream, place).below(len(STATEMENTS))]
        return encode(self._tokenizer, template.format(relation=relation, name=name, value=value))

    def ask(self, stream: int, place: int, source: int, draws: CounterRNG) -> TextSample:
        template = QUESTIONS[draws.below(len(QUESTIONS))]
        newest = self._told - 1
        if place != newest and draws.uniform() < self.options.unknown:
            ahead = 1 + draws.below(len(self._people) * len(RELATIONS) // 2 - 1)
            relation, name, _ = self.fact(stream, newest + ahead)
            return self._text(template, relation, name, UNKNOWN, NO_SOURCE)
        return self._text(template, *self.fact(stream, place), source)

    def longest(self) -> tuple[int, int]:
        def size(text: str) -> int:
            return len(encode(self._tokenizer, text))

        firsts, lasts = (max((name.capitalize() for name in names), key=size) for names in (FIRST_NAMES, LAST_NAMES))
        values = [max([*VALUES[key], UNKNOWN], key=size) for key in RELATIONS]
        filled = [
            [template.format(relation=relation, name=f"{firsts} {lasts}", value=value) for template in templates]
            for templates in (STATEMENTS, QUESTIONS)
            for relation, value in zip(RELATIONS.values(), values, strict=True)
        ]
        told, asked = filled[: len(RELATIONS)], filled[len(RELATIONS) :]
        return max(size(text) for row in told for text in row), max(size(text) for row in asked for text in row)

    def _text(self, template: str, relation: str, name: str, value: str, source: int) -> TextSample:
        before = template.partition(" {value}")[0].format(relation=relation, name=name)
        ids = encode(self._tokenizer, f"{before} {value}.")
        start, end = (shared(ids, encode(self._tokenizer, text)) for text in (before, f"{before} {value}"))
        given = 1 if self.options.label_question else start
        return TextSample(ids, source=source, prompt_tokens=given, query_tokens=start, answer=(start, end))
