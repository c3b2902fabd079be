"""Language: the words of a little language, its facts, the sentences that tell them and the questions for them."""

from __future__ import annotations

from functools import cached_property

from attrs import define, field

from mplus.config import whole
from mplus.errors import ConfigError, InputError

FIRST_NAMES = """
ada agnes alan albert alma amos anna anton basil bella bert boris bruno cara carl clara cyril daisy dora edgar edith
edwin ella elmer elsa emil emma enid erik ernst ethel eva felix flora frank freda fritz gerda grace greta gustav hanna
harold heidi helen henry hilda hugo ida igor ingrid irma isaac ivan jacob jane jonas judith julia karl klara knut laura
lena leon lotte louis lucy magnus marta max mila mina moritz nadia nina nora oscar paula peter
""".split()

LAST_NAMES = """
abbott adler archer arnold baker barlow becker bennet bishop bolton bowen bradley brandt burton butler carver chandler
clark cooper cramer dalton dawson dixon draper dreyer eaton ellis engel farmer fisher fletcher fowler foster frost
fuller gardner gibson glover graham hagen hammer harper hobson holt hooper hunter jensen keller kramer lambert larsen
lehmann marlow mason mercer meyer miller morgan morris murray nelson newton norton osborn palmer parker porter potter
quinn reeves ritter rogers sawyer schmidt shaw sutton tanner taylor thatcher turner
""".split()

VALUES = {
    "colour": """
    amber azure beige black blue bronze brown copper crimson cyan gold green grey indigo ivory jade khaki lilac magenta
    maroon mauve navy ochre pink purple red scarlet silver tan teal violet white
    """.split(),
    "town": """
    athens bergen berlin bern boston brest bristol cairo cardiff cork delhi dover dublin essen geneva ghent lima lisbon
    london lyon madrid malmo milan naples oslo oxford paris prague riga rome seoul turin
    """.split(),
    "pet": """
    badger beaver canary cat cobra crab crow dog donkey duck eagle ferret fox frog goat goose hamster hare hawk heron
    horse iguana lizard mouse otter owl parrot pony rabbit snail spider turtle
    """.split(),
    "fruit": """
    almond apple apricot banana cherry citron coconut currant date fig grape guava kiwi kumquat lemon lime lychee mango
    medlar melon mulberry nectarine nutmeg papaya peach pear plum pomelo quince raisin raspberry walnut
    """.split(),
}
"""Relation -> the words of its values: 32 each, so a guess is right once in 32."""

TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
UNITS = "one two three four five six seven eight".split()
"""A number is two words, one of each set: 64 values, so a guess is right once in 64."""

FILLERS = """
<other> the and to a in that was he it his her she with as had you for at on not but be him they said is have from all
which this
""".split()
"""Words that mean nothing here; every word that is not known becomes the first of them."""

PAD, BEGIN, UNKNOWN, OF, STOP = "<pad>", "<s>", "unknown", "of", "."
NUMBER = "number"

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
        limits = {"relations": 5, "firsts": len(FIRST_NAMES), "lasts": len(LAST_NAMES)}
        for name, most in limits.items():
            if getattr(self, name) > most:
                raise ConfigError(f"{name} must be at most {most}, got {getattr(self, name)}")

    @cached_property
    def vocabulary(self) -> tuple[str, ...]:
        """Return all words; a word's id is its place. The same for every choice of sizes."""
        values = [word for some in VALUES.values() for word in some]
        return (
            *(PAD, BEGIN, UNKNOWN, OF, STOP),
            *(*VALUES, NUMBER),
            *FIRST_NAMES,
            *LAST_NAMES,
            *values,
            *TENS,
            *UNITS,
            *FILLERS,
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
        return (*VALUES, NUMBER)[: self.relations]

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
        return [self.relation(fact), OF, FIRST_NAMES[first], LAST_NAMES[last]]

    def values(self, fact: int) -> int:
        """Return how many values a fact can have; a guess is right once in so many."""
        relation = self.relation(fact)
        return len(TENS) * len(UNITS) if relation == NUMBER else len(VALUES[relation])

    def value(self, fact: int, number: int) -> list[str]:
        """Return the words of value ``number``, below ``values``, of a fact."""
        relation = self.relation(fact)
        if relation != NUMBER:
            return [VALUES[relation][number]]
        return [TENS[number // len(UNITS)], UNITS[number % len(UNITS)]]

    def sentence(self, fact: int, number: int) -> list[str]:
        """Return the words that tell a fact."""
        return [*self.question(fact), *self.value(fact, number), STOP]

    def fact(self, question: str) -> int:
        """Return the number of the fact that a question of four words asks for.

        Raises:
            InputError: it is no question of this language; the message says what one looks like.
        """
        given = question.lower().split()
        relations = self.relation_names
        firsts, lasts = FIRST_NAMES[: self.firsts], LAST_NAMES[: self.lasts]
        well_formed = len(given) == 4 and given[1] == OF
        if not (well_formed and given[0] in relations and given[2] in firsts and given[3] in lasts):
            raise InputError(
                f"a question must be RELATION of FIRST LAST with a relation of {', '.join(relations)} and known names "
                f"(such as {firsts[0]} {lasts[0]}), got {question!r}"
            )
        return (relations.index(given[0]) * self.firsts + firsts.index(given[2])) * self.lasts + lasts.index(given[3])
