"""Needles: one sentence hidden in a novel of a given length, at a given depth, and asked for at the end."""

from __future__ import annotations

import random
from collections.abc import Sequence

from attrs import define, field
from attrs.converters import optional

from mplus.config import JsonValue, is_number, must_be, one_of, whole
from mplus.evaluation.tasks.base import Episode, FileOptions, Passage, Protocol, Question
from mplus.evaluation.tasks.contexts import holds
from mplus.evaluation.tasks.novels import haystack, novel_paragraphs
from mplus.evaluation.tasks.people import SPLITS, Split, draw_names, fill, people_of

CELL = "{} tokens at depth {}"
"""Category of a needle in a haystack of so many tokens, at a depth from 0 to 1."""


DEPTHS = must_be(
    "numbers from 0 (the beginning) to 1 (the end)",
    lambda value: bool(value) and all(is_number(depth, 0, 1) for depth in value),  # type: ignore[union-attr]
)
"""Validator of depths."""


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
            episodes: of each depth and length.
            split: of names, values, sentences and novels; see ``mplus.evaluation.tasks.people``.
            prompt: how it is asked; ``{question}`` stands for the question.
        """

        tokens: int = field(default=20_000, validator=whole(1))
        lengths: tuple[int, ...] | None = field(default=None, converter=optional(tuple))
        depths: tuple[float, ...] = field(default=(0, 0.25, 0.5, 0.75, 1), converter=tuple, validator=DEPTHS)
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
        return 2 + -(-2 * max(self._lengths) // self.options.passage_tokens)

    @property
    def _lengths(self) -> tuple[int, ...]:
        return self.options.lengths or (self.options.tokens,)

    def episodes(self) -> list[Episode]:
        options = self.options
        rng = random.Random(f"{self.name}:{options.split}:{options.seed}")  # noqa: S311 - reproducible
        books = novel_paragraphs(options.data, "train" if options.split == "choose" else "test")
        cases = [
            (tokens, depth) for tokens in self._lengths for depth in options.depths for _ in range(options.episodes)
        ]
        people = draw_names(len(cases), options.split, rng)
        made = []
        for number, ((tokens, depth), person) in enumerate(zip(cases, people, strict=True)):
            novel = list(haystack(self.texts, books, tokens, options.passage_tokens, rng))
            made.append(
                self._episode(number, CELL.format(tokens, depth), person, novel, round(depth * len(novel)), rng)
            )
        return made

    def _episode(
        self, number: int, category: str, person: str, novel: Sequence[str], place: int, rng: random.Random
    ) -> Episode:
        kind = rng.choice(people_of(self.options.split).attributes)
        value = rng.choice(kind.values)
        needle = fill(rng.choice(kind.told), person, value)
        told = [Passage(text=text, source=f"novel {at}") for at, text in enumerate(novel)]
        told.insert(place, Passage(text=needle, source="needle"))
        prompt = self.options.prompt.replace("{question}", fill(kind.asked[0], person))
        age = len(novel) - place
        question = Question(
            prompt=prompt, answers=(value,), needs=(place,), after=place, ages=(age,), category=category
        )
        return Episode(number=number, passages=tuple(told), questions=(question,))

    def settings(self) -> dict[str, JsonValue]:
        """Return every option that is used."""
        unused = {"passages", "before", "questions", "untold"}
        return {name: value for name, value in super().settings().items() if name not in unused}
