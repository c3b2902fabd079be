"""bAbI facts hidden in novels: the sentences of a little story, spread over passages of a book."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from attrs import define, field

from mplus.config import one_of, whole
from mplus.errors import InputError
from mplus.evaluation.tasks.base import Episode, FileOptions, Passage, Protocol, Question
from mplus.evaluation.tasks.contexts import holds
from mplus.evaluation.tasks.novels import book_passages, novel_paragraphs
from mplus.evaluation.texts import read

TRAIN_QUESTIONS = 800
"""So many questions of a task train, the rest test."""


@define(frozen=True)
class Story:
    """``sentences`` up to a question, its ``answer``, and the places of the sentences that hold it."""

    sentences: tuple[str, ...]
    question: str
    answer: str
    needs: tuple[int, ...]


class Babi(Protocol):
    """Reads a task file of bAbI 1.2 and novels as text.

    Age is counted from the passage with the last sentence of the story, whether the answer is in that one or not:
    what is told later may change the answer.
    """

    @define(frozen=True, kw_only=True)
    class Options(FileOptions):
        """Besides what every protocol can be told.

        Attributes:
            novels: a text file (``.txt`` or ``.txt.gz``), or a folder of them; with an INDEX.tsv in it that has the
                columns file and split, only the novels of ``split``.
            split: the first 800 questions of a task are "train", the rest "test".
            spread: most passages that the sentences of one story are spread over.
            sentences: longest story, in sentences.
            prompt: how it is asked; ``{question}`` stands for the question.
        """

        novels: Path = field(converter=Path)
        split: Literal["test", "train", "all"] = field(default="test", validator=one_of("test", "train", "all"))
        spread: int = field(default=1, validator=whole(1))
        sentences: int = field(default=12, validator=whole(1))
        prompt: str = field(default="Question: {question}\nAnswer:", validator=holds("{question}"))

    options: Options
    name = "babi"
    _chance: float | None = None

    @property
    def deviations(self) -> tuple[str, ...]:
        return (
            "not a protocol of the paper: facts of bAbI in novels, as BABILong does; novels and places differ from it",
        )

    @property
    def chance(self) -> float | None:
        """Return the accuracy of guessing among the answers that occur in the task; None before ``episodes``."""
        return self._chance

    def episodes(self) -> list[Episode]:
        options = self.options
        if (options.questions, options.untold) != (1, 0):
            raise InputError(
                f"{self.name}: a story has one question and all of it is told, so questions must be 1 and untold 0, "
                f"got {options.questions} and {options.untold}"
            )
        stories = babi_stories(options.data)
        self._chance = 1 / len({story.answer for story in stories})
        train, test = stories[:TRAIN_QUESTIONS], stories[TRAIN_QUESTIONS:]
        chosen = {"train": train, "test": test, "all": stories}[options.split]
        short = [story for story in chosen if len(story.sentences) <= options.sentences]
        if not short:
            raise InputError(
                f"{self.name}: the {options.split} part of {options.data} must have a story of at most "
                f"{options.sentences} sentences, it has {len(chosen)} stories and none is: raise sentences, or use "
                "another split"
            )
        rng = random.Random(f"{self.name}:{options.seed}")  # noqa: S311 - reproducible, not secret
        rng.shuffle(short)
        novels = novel_paragraphs(options.novels, options.split)
        return [self._episode(number, story, novels, rng) for number, story in enumerate(short[: options.episodes])]

    def _episode(self, number: int, story: Story, novels: Sequence[Sequence[str]], rng: random.Random) -> Episode:
        options = self.options
        places = _places(len(story.sentences), options.spread)
        spread = places[-1] + 1
        book = book_passages(self.texts, novels, options.passage_tokens, rng)
        passages = []
        for place in range(options.before + spread + options.passages - 1):
            told = [s for s, at in zip(story.sentences, places, strict=True) if at + options.before == place]
            text = self._hide(next(book), told, rng) if told else next(book)
            passages.append(Passage(text=text, source=f"story {place}" if told else f"novel {place}"))
        needs = tuple(sorted({options.before + places[need] for need in story.needs}))
        asked = [
            Question(
                prompt=options.prompt.replace("{question}", story.question),
                answers=(story.answer,),
                needs=needs,
                after=options.before + spread - 1,
            )
        ]
        return Episode(number=number, passages=tuple(passages), questions=tuple(asked))

    def _hide(self, text: str, sentences: Sequence[str], rng: random.Random) -> str:
        """Cut ``text`` so that the sentences go into it, each behind a sentence of the text, in their order."""
        limit = self.options.passage_tokens
        room = sum(self.texts.count(" " + sentence) for sentence in sentences)
        while room < limit:
            parts = re.split(r"(?<=[.!?])\s+", self.texts.cut(text, limit - room))
            places = sorted(rng.randrange(len(parts)) + 1 for _ in sentences)
            for place, sentence in reversed(list(zip(places, sentences, strict=True))):
                parts.insert(place, sentence)
            hidden = " ".join(parts)
            if self.texts.count(hidden) <= limit:
                return hidden
            room += 1  # joined texts can have a token more than their parts
        raise InputError(
            f"{self.name}: passage_tokens must leave room for the story, {room} tokens, got {limit}: raise it, or "
            "spread the story further"
        )


def _places(sentences: int, spread: int) -> list[int]:
    """Return which of at most ``spread`` passages each sentence is told in: evenly, in order."""
    spread = min(spread, sentences)
    return [number * spread // sentences for number in range(sentences)]


def babi_stories(path: Path) -> list[Story]:
    """Return every question of a task file with the sentences before it, in order.

    Raises:
        InputError: the file cannot be read, or a line has another format.
    """
    stories: list[Story] = []
    sentences: dict[int, str] = {}
    for at, line in enumerate(read(path).splitlines(), 1):
        first, _, text = line.strip().partition(" ")
        try:
            number = int(first)
            if number == 1:
                sentences = {}
            if "\t" not in text:
                sentences[number] = text.strip()
                continue
            question, answer, needs = text.split("\t")
            order = list(sentences)
            supporting = tuple(order.index(int(need)) for need in needs.split())
            stories.append(Story(tuple(sentences.values()), question.strip(), answer.strip(), supporting))
        except ValueError as error:
            raise InputError(f"line {at} of {path} must be a sentence or a question of bAbI: {error}") from error
    if not stories:
        raise InputError(f"{path} must have questions of bAbI, it has none")
    return stories
