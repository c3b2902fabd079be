"""Notes: what a person jots down about others, told one note a passage, alone or among a novel, asked at the end."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from attrs import define, field
from attrs.converters import optional

from mplus.config import JsonValue, number, one_of, whole
from mplus.errors import InputError
from mplus.evaluation.tasks.base import Episode, Passage, Protocol, Question
from mplus.evaluation.tasks.contexts import holds
from mplus.evaluation.tasks.novels import haystack, novel_paragraphs
from mplus.evaluation.tasks.people.attributes import Attribute
from mplus.evaluation.tasks.people.splits import SPLITS, Split, draw_names, fill, people_of


@define(frozen=True)
class Fact:
    """``person`` has had the ``values`` of ``attribute`` in turn; the last one is true."""

    person: str
    attribute: Attribute
    values: tuple[str, ...]


class Notes(Protocol):
    """Makes notes about invented people and asks for what they say, when all has been told.

    A question names the person in full, and its answer is in one note only: of a fact that changed, in the newest.

    Example:
        >>> Notes.Options(notes=48, questions=24, split="test").facts
        4
    """

    @define(frozen=True, kw_only=True)
    class Options(Protocol.Options):
        """Options of notes; ``passages`` and ``before`` are not used, since everything is asked at the end.

        Attributes:
            data: novels to tell the notes among: a text file or a folder of them; None: nothing but notes.
            among: tokens of novels that are told in all, between the notes.
            notes: how many there are.
            facts: told of each person, so that other notes name the same person.
            changed: share of the facts that change later, by a note of their own.
            questions: of each episode; at most one for a fact.
            split: names, values and sentences for choosing settings ("choose"), for what is reported ("test"), or such
                as nothing was tried on before ("unseen"; "fresh", made later).
            prompt: how it is asked; ``{question}`` stands for the question.
        """

        data: Path | None = field(default=None, converter=optional(Path))
        among: int = field(default=0, validator=whole(0))
        notes: int = field(default=48, validator=whole(1))
        facts: int = field(default=4, validator=whole(1))
        changed: float = field(default=0.0, validator=number(0, 1))
        episodes: int = field(default=1, validator=whole(1))
        questions: int = field(default=24, validator=whole(1))
        passage_tokens: int = field(default=128, validator=whole(1))
        split: Split = field(default="test", validator=one_of(*SPLITS))
        prompt: str = field(default="{question} Answer with one short sentence.", validator=holds("{question}"))

    options: Options
    name = "notes"
    answer_tokens = 16
    ages = (0,)

    @property
    def deviations(self) -> tuple[str, ...]:
        return ("not a protocol of the paper: generated notes about invented people, all asked for at the end",)

    @property
    def passages(self) -> int:
        """Return the most passages of an episode."""
        return self.options.notes + -(-2 * self.options.among // self.options.passage_tokens)

    def episodes(self) -> list[Episode]:
        kinds = len(people_of(self.options.split).attributes)
        if self.options.facts > kinds:
            raise InputError(f"facts must be at most {kinds}, one of each kind, got {self.options.facts}")
        return [self._episode(number) for number in range(self.options.episodes)]

    def _episode(self, number_: int) -> Episode:
        options = self.options
        rng = random.Random(f"{self.name}:{options.split}:{options.seed}:{number_}")  # noqa: S311 - reproducible
        facts = self._facts(rng)
        notes = _in_order(facts, rng)
        texts = [(text, f"note {place}") for place, (text, _, _) in enumerate(notes)]
        places = list(range(len(notes)))
        if options.among:
            texts, places = self._among(texts, rng)
        told = tuple(Passage(text=text, source=source) for text, source in texts)
        newest = {fact: places[place] for place, (_, fact, last) in enumerate(notes) if last}
        asked = rng.sample(list(newest), min(options.questions, len(newest)))
        questions = [self._question(fact, fact.values[-1:], (newest[fact],), len(told) - 1) for fact in asked]
        questions += [self._question(fact, (), (), len(told) - 1) for fact in self._untold(facts, rng)]
        return Episode(number=number_, passages=told, questions=tuple(questions))

    def _question(self, fact: Fact, answers: tuple[str, ...], needs: tuple[int, ...], after: int) -> Question:
        (asked,) = fact.attribute.asked
        prompt = self.options.prompt.replace("{question}", fill(asked, fact.person))
        return Question(prompt=prompt, answers=answers, needs=needs, after=after)

    def _facts(self, rng: random.Random) -> list[Fact]:
        """Draw facts until they make as many notes as there should be."""
        options = self.options
        people = draw_names(-(-options.notes // options.facts), options.split, rng)
        kinds = people_of(options.split).attributes
        facts: list[Fact] = []
        left = options.notes
        for person in people:
            for attribute in rng.sample(kinds, options.facts):
                turns = 2 if left > 1 and rng.random() < options.changed else 1
                if left:
                    facts.append(Fact(person, attribute, tuple(rng.sample(attribute.values, turns))))
                    left -= turns
        return facts

    def _untold(self, facts: Sequence[Fact], rng: random.Random) -> Iterator[Fact]:
        """Yield what was never told, in turn: of people in the notes another thing, and of people who are in none."""
        options = self.options
        told = {(fact.person, fact.attribute) for fact in facts}
        known = list(dict.fromkeys(fact.person for fact in facts))
        strangers = [name for name in draw_names(4 * len(known), options.split, rng) if name not in known]
        kinds = people_of(options.split).attributes
        others = [Fact(person, kind, ()) for person in known for kind in kinds if (person, kind) not in told]
        rng.shuffle(others)
        for number_ in range(options.untold):
            if number_ % 2 or not others:
                yield Fact(strangers[number_ % len(strangers)], rng.choice(kinds), ())
            else:
                yield others.pop()

    def _among(self, notes: list[tuple[str, str]], rng: random.Random) -> tuple[list[tuple[str, str]], list[int]]:
        """Put the notes between passages of novels at random places, in order; return all, and where the notes are."""
        options = self.options
        if options.data is None:
            raise InputError("among needs novels: set data to a text file or a folder of them")
        books = novel_paragraphs(options.data, "train" if options.split == "choose" else "test")
        novel = list(haystack(self.texts, books, options.among, options.passage_tokens, rng))
        after = sorted(rng.randrange(len(novel) + 1) for _ in notes)
        mixed: list[tuple[str, str]] = []
        places: list[int] = []
        for place in range(len(novel) + 1):
            while len(places) < len(notes) and after[len(places)] == place:
                places.append(len(mixed))
                mixed.append(notes[len(places) - 1])
            if place < len(novel):
                mixed.append((novel[place], f"novel {place}"))
        return mixed, places

    def settings(self) -> dict[str, JsonValue]:
        """Return every option that is used."""
        return {name: value for name, value in super().settings().items() if name not in {"passages", "before"}}


def _in_order(facts: Sequence[Fact], rng: random.Random) -> list[tuple[str, Fact, bool]]:
    """Return the notes about ``facts`` in random order, but what changed behind what was; and which are the newest."""
    order = [(rng.random(), fact) for fact in facts for _ in fact.values]
    seen: dict[Fact, int] = {}
    notes = []
    for _, fact in sorted(order, key=lambda entry: entry[0]):
        turn = seen[fact] = seen.get(fact, -1) + 1
        sentences = fact.attribute.changed if turn else fact.attribute.told
        text = fill(rng.choice(sentences), fact.person, fact.values[turn])
        notes.append((text, fact, turn == len(fact.values) - 1))
    return notes
