"""Needles: one sentence hidden in a novel of a given length, at a given depth, and asked for at the end."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

from attrs import define, field
from attrs.converters import optional

from mplus.config import JsonValue, flag, is_number, must_be, one_of, whole
from mplus.evaluation.tasks.base import Episode, FileOptions, Passage, Protocol, Question
from mplus.evaluation.tasks.contexts import holds
from mplus.evaluation.tasks.novels import haystack, novel_paragraphs
from mplus.evaluation.tasks.people.splits import SPLITS, Split, draw_names, fill, people_of

CELL = "{} tokens at depth {}"
"""Category of a needle in a haystack of so many tokens, at a depth from 0 to 1."""


DEPTHS = must_be(
    "numbers from 0 (the beginning) to 1 (the end)",
    lambda value: bool(value) and all(is_number(depth, 0, 1) for depth in value),  # type: ignore[union-attr]
)
"""Validator of depths."""


@define(frozen=True)
class Needle:
    """A sentence to hide, with the ``value`` in it that its ``prompt`` asks for."""

    text: str
    value: str
    prompt: str

    def question(self, place: int, asked: int, category: str) -> Question:
        """Return the question for the needle at ``place``, asked when the passage ``asked`` has been told."""
        return Question(
            prompt=self.prompt,
            answers=(self.value,),
            needs=(place,),
            after=place,
            ages=(asked - place,),
            category=category,
        )


class Needles(Protocol):
    """Makes haystacks of novels: ``episodes`` for every depth, each with a needle of its own.

    With several ``lengths``, their depths make a heat map. The category of a question is its length and depth.
    """

    @define(frozen=True, kw_only=True)
    class Options(FileOptions):
        """Options of needles; ``passages``, ``before``, ``questions`` and ``untold`` are not used.

        Attributes:
            data: novels: a text file (``.txt`` or ``.txt.gz``) or a folder of them.
            tokens: of the haystack.
            lengths: several of these, with all depths of each; None: ``tokens`` alone.
            depths: where the needle lies, from 0, the beginning, to 1, the end.
            together: tell one novel only, as long as the longest length, with the needles of all cells in it; those of
                a length are asked for as soon as so much of it has been told. It takes a fraction of the time, and a
                question has other needles beside its own.
            episodes: of each depth and length.
            split: of names, values, sentences and novels; see ``mplus.evaluation.tasks.people``.
            prompt: how it is asked; ``{question}`` stands for the question.
        """

        tokens: int = field(default=20_000, validator=whole(1))
        lengths: tuple[int, ...] | None = field(default=None, converter=optional(tuple))
        depths: tuple[float, ...] = field(default=(0, 0.25, 0.5, 0.75, 1), converter=tuple, validator=DEPTHS)
        together: bool = field(default=False, validator=flag)
        episodes: int = field(default=5, validator=whole(1))
        split: Split = field(default="test", validator=one_of(*SPLITS))
        prompt: str = field(default="{question} Answer with one short sentence.", validator=holds("{question}"))

    options: Options
    name = "needles"
    answer_tokens = 16
    ages = (0,)

    @property
    def deviations(self) -> tuple[str, ...]:
        return ("not a protocol of the paper: needles are sentences about invented people, haystacks are novels",)

    @property
    def passages(self) -> int:
        """Return the most passages of an episode."""
        needles = len(self._cases()) if self.options.together else 1
        return 1 + needles + -(-2 * max(self._lengths) // self.options.passage_tokens)

    @property
    def _lengths(self) -> tuple[int, ...]:
        return self.options.lengths or (self.options.tokens,)

    def _cases(self) -> list[tuple[int, float]]:
        """Return length and depth of every needle."""
        options = self.options
        return [
            (tokens, depth) for tokens in self._lengths for depth in options.depths for _ in range(options.episodes)
        ]

    def episodes(self) -> list[Episode]:
        options = self.options
        rng = random.Random(f"{self.name}:{options.split}:{options.seed}")  # noqa: S311 - reproducible
        books = novel_paragraphs(options.data, "train" if options.split == "choose" else "test")
        cases = self._cases()
        people = draw_names(len(cases), options.split, rng)
        if options.together:
            novel = list(haystack(self.texts, books, max(self._lengths), options.passage_tokens, rng))
            return [self._episode_of_all(novel, cases, [self._needle(person, rng) for person in people])]
        made = []
        for number, ((tokens, depth), person) in enumerate(zip(cases, people, strict=True)):
            novel = list(haystack(self.texts, books, tokens, options.passage_tokens, rng))
            needle, place = self._needle(person, rng), round(depth * len(novel))
            told = [Passage(text=text, source=f"novel {at}") for at, text in enumerate(novel)]
            told.insert(place, Passage(text=needle.text, source="needle"))
            question = needle.question(place, len(novel), CELL.format(tokens, depth))
            made.append(Episode(number=number, passages=tuple(told), questions=(question,)))
        return made

    def _needle(self, person: str, rng: random.Random) -> Needle:
        kind = rng.choice(people_of(self.options.split).attributes)
        value = rng.choice(kind.values)
        text = fill(rng.choice(kind.told), person, value)
        return Needle(text, value, self.options.prompt.replace("{question}", fill(kind.asked[0], person)))

    def _episode_of_all(
        self, novel: Sequence[str], cases: Sequence[tuple[int, float]], needles: Sequence[Needle]
    ) -> Episode:
        """Return one episode in which the needles of all lengths and depths lie in one novel."""
        ends = list(accumulate(self.texts.count(text) for text in novel))
        # How many passages of the novel are told when a length is reached.
        reached = {tokens: bisect_left(ends, min(tokens, ends[-1])) + 1 for tokens in self._lengths}
        in_front: dict[int, list[int]] = {}
        for number, (tokens, depth) in enumerate(cases):
            in_front.setdefault(round(depth * reached[tokens]), []).append(number)
        told: list[Passage] = []
        places: dict[int, int] = {}
        last: dict[int, int] = {}
        for at in range(len(novel) + 1):
            for number in in_front.get(at, ()):
                places[number] = len(told)
                told.append(Passage(text=needles[number].text, source=f"needle {number}"))
            last[at] = len(told) - 1  # with the needles at the end of a length
            if at < len(novel):
                told.append(Passage(text=novel[at], source=f"novel {at}"))
        questions = tuple(
            needle.question(places[number], last[reached[tokens]], CELL.format(tokens, depth))
            for number, ((tokens, depth), needle) in enumerate(zip(cases, needles, strict=True))
        )
        return Episode(number=0, passages=tuple(told), questions=questions)

    def settings(self) -> dict[str, JsonValue]:
        """Return every option that is used."""
        unused = {"passages", "before", "questions", "untold"}
        return {name: value for name, value in super().settings().items() if name not in unused}
