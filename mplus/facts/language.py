"""Language: facts, the sentences that tell them and the questions that ask for them."""

from __future__ import annotations

from functools import cached_property

from attrs import define, field

from mplus.config import whole
from mplus.errors import ConfigError, InputError
from mplus.facts import words

HELD_OUT = 5
"""One pair of names in so many is kept out of training, though each of its two words is trained."""


@define(frozen=True, kw_only=True, slots=False)
class Language:
    """``RELATION of FIRST LAST VALUE .`` tells a fact, ``RELATION of FIRST LAST`` asks for it.

    A fact is known by one number: ``relation * names + first * lasts + last``. Its value is drawn when it is told, so
    nothing about it can be learnt by heart.

    Attributes:
        relations: how many relations there are: up to four with values of one word; the fifth is "number", whose
            values have two.
        firsts, lasts: how many first and last names; ``firsts * lasts`` people.
    """

    relations: int = field(default=4, validator=whole(1))
    firsts: int = field(default=80, validator=whole(1))
    lasts: int = field(default=80, validator=whole(1))

    def __attrs_post_init__(self) -> None:
        limits = {"relations": 5, "firsts": len(words.FIRST_NAMES), "lasts": len(words.LAST_NAMES)}
        for name, most in limits.items():
            if getattr(self, name) > most:
                raise ConfigError(f"{name} must be at most {most}, got {getattr(self, name)}")

    @cached_property
    def vocabulary(self) -> tuple[str, ...]:
        """Return all words; a word's id is its place. The same for every choice of sizes."""
        values = [word for some in words.VALUES.values() for word in some]
        return (
            *(words.PAD, words.BEGIN, words.UNKNOWN, words.OF, words.STOP),
            *(*words.VALUES, words.NUMBER),
            *words.FIRST_NAMES,
            *words.LAST_NAMES,
            *values,
            *words.TENS,
            *words.UNITS,
            *words.FILLERS,
        )

    @cached_property
    def ids(self) -> dict[str, int]:
        """Return word -> id."""
        return {word: place for place, word in enumerate(self.vocabulary)}

    @property
    def names(self) -> int:
        """Return the number of people."""
        return self.firsts * self.lasts

    @property
    def facts(self) -> int:
        """Return the number of facts."""
        return self.relations * self.names

    @property
    def value_tokens(self) -> int:
        """Return how many words the longest value has."""
        return 2 if self.relations == 5 else 1

    @property
    def sentence_tokens(self) -> int:
        """Return how many words the longest sentence has."""
        return 5 + self.value_tokens

    @cached_property
    def people(self) -> dict[bool, list[int]]:
        """Return the numbers of the people who are held out of training (True), and of those who are not (False)."""
        found: dict[bool, list[int]] = {True: [], False: []}
        for person in range(self.names):
            found[self.held_out(person)].append(person)
        return found

    @property
    def relation_names(self) -> tuple[str, ...]:
        """Return the relations."""
        return (*words.VALUES, words.NUMBER)[: self.relations]

    def relation(self, fact: int) -> str:
        """Return the relation of a fact."""
        return self.relation_names[fact // self.names]

    def held_out(self, fact: int) -> bool:
        """Return whether the fact's two names are never seen together in training."""
        first, last = divmod(fact % self.names, self.lasts)
        return (first + last) % HELD_OUT == HELD_OUT - 1

    def question(self, fact: int) -> list[str]:
        """Return the four words that ask for a fact."""
        first, last = divmod(fact % self.names, self.lasts)
        return [self.relation(fact), words.OF, words.FIRST_NAMES[first], words.LAST_NAMES[last]]

    def values(self, fact: int) -> int:
        """Return how many values a fact can have; a guess is right once in so many."""
        relation = self.relation(fact)
        return len(words.TENS) * len(words.UNITS) if relation == words.NUMBER else len(words.VALUES[relation])

    def value(self, fact: int, number: int) -> list[str]:
        """Return the words of value ``number``, below ``values``, of a fact."""
        relation = self.relation(fact)
        if relation != words.NUMBER:
            return [words.VALUES[relation][number]]
        return [words.TENS[number // len(words.UNITS)], words.UNITS[number % len(words.UNITS)]]

    def sentence(self, fact: int, number: int) -> list[str]:
        """Return the words that tell a fact."""
        return [*self.question(fact), *self.value(fact, number), words.STOP]

    def fact(self, question: str) -> int:
        """Return the number of the fact that a question of four words asks for.

        Raises:
            InputError: it is no question of this language; the message says what one looks like.
        """
        given = question.lower().split()
        relations = self.relation_names
        firsts, lasts = words.FIRST_NAMES[: self.firsts], words.LAST_NAMES[: self.lasts]
        well_formed = len(given) == 4 and given[1] == words.OF
        if not (well_formed and given[0] in relations and given[2] in firsts and given[3] in lasts):
            raise InputError(
                f"a question must be RELATION of FIRST LAST with a relation of {', '.join(relations)} and known names "
                f"(such as {firsts[0]} {lasts[0]}), got {question!r}"
            )
        return (relations.index(given[0]) * self.firsts + firsts.index(given[2])) * self.lasts + lasts.index(given[3])
