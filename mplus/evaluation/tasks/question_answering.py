"""Protocols that ask questions about paragraphs: SQuAD, and NaturalQuestions with its gold passages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from attrs import define, field
from attrs.converters import optional

from mplus.config import one_of, whole
from mplus.errors import InputError
from mplus.evaluation.tasks.base import Episode
from mplus.evaluation.tasks.contexts import Asked, Context, ContextOptions, ContextProtocol, holds
from mplus.evaluation.texts import read

EVERY = 4
"""Of the titles in alphabetical order, every so many-th is a test article."""


class Squad(ContextProtocol):
    """Reads the official JSON of SQuAD 1.1 or 2.0; questions without an answer are left out."""

    @define(frozen=True, kw_only=True)
    class Options(ContextOptions):
        """``split``: which articles are told and asked about; distraction comes from the "train" articles."""

        split: Literal["test", "train", "all"] = field(default="test", validator=one_of("test", "train", "all"))

    options: Options
    name = "squad"

    @property
    def deviations(self) -> tuple[str, ...]:
        return (
            "questions are not filtered by whether another model can answer them",
            "distraction is joined from paragraphs of the file's train articles, not taken from SQuAD's train set",
        )

    def episodes(self) -> list[Episode]:
        contexts = squad_contexts(self.options.data)
        test = test_titles(contexts)
        wanted = {"test": {True}, "train": {False}, "all": {True, False}}[self.options.split]
        told = [context for context in contexts if (context.title in test) in wanted]
        return self.make(told, [context for context in contexts if context.title not in test])


def squad_contexts(path: Path) -> list[Context]:
    """Return every paragraph of a file in the official format, in order.

    Raises:
        InputError: it cannot be read, or has another format.
    """
    text = read(path)
    try:
        return [
            Context(
                article["title"],
                paragraph["context"],
                tuple(
                    Asked(qa["question"].strip(), tuple(dict.fromkeys(answer["text"] for answer in qa["answers"])))
                    for qa in paragraph["qas"]
                    if qa["answers"]
                ),
            )
            for article in json.loads(text)["data"]
            for paragraph in article["paragraphs"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} must be a JSON file in the format of SQuAD: {error!r}") from error


def test_titles(contexts: Sequence[Context]) -> set[str]:
    """Return the titles of the test articles: in alphabetical order the fourth, the eighth and so on."""
    return set(sorted({context.title for context in contexts})[EVERY - 1 :: EVERY])


class NaturalQuestions(ContextProtocol):
    """Reads the open questions with gold passages of "Lost in the Middle" (``nq-open-oracle.jsonl[.gz]``)."""

    @define(frozen=True, kw_only=True)
    class Options(ContextOptions):
        """Besides what a protocol over contexts can be told.

        Attributes:
            told: the gold "passage" of about 100 words, or the annotated "long_answer".
            distraction: a SQuAD file whose train articles distract (as published, but for their being those of the
                development set); None: gold passages of other questions.
        """

        answer_tokens: int | None = field(default=4, validator=whole(1, optional=True))
        prompt: str = field(default="Question: {question}?\nAnswer:", validator=holds("{question}"))
        told: Literal["passage", "long_answer"] = field(default="passage", validator=one_of("passage", "long_answer"))
        distraction: Path | None = field(default=None, converter=optional(Path))

    options: Options
    name = "natural-questions"

    @property
    def deviations(self) -> tuple[str, ...]:
        return (
            "questions are not filtered by whether another model can answer them",
            "distraction: gold passages of other questions, not SQuAD"
            if self.options.distraction is None
            else "distraction is joined from articles of the SQuAD file given, not taken from SQuAD's train set",
        )

    def episodes(self) -> list[Episode]:
        contexts = oracle_contexts(self.options.data, self.options.told)
        if self.options.distraction is None:
            return self.make(contexts, contexts)
        others = squad_contexts(self.options.distraction)
        test = test_titles(others)
        return self.make(contexts, [context for context in others if context.title not in test])


def oracle_contexts(path: Path, told: str) -> list[Context]:
    """Return every question with its gold passage, where that holds the first answer.

    Raises:
        InputError: the file cannot be read, or a line has another format.
    """
    contexts = []
    for number, line in enumerate(read(path).splitlines(), 1):
        try:
            entry = json.loads(line)
            gold = next(context for context in entry["ctxs"] if context["isgold"])
            text = gold["text"] if told == "passage" else entry["nq_annotated_gold"]["long_answer"]
            answers = tuple(entry["answers"])
            if answers and answers[0] in text:
                contexts.append(Context(gold["title"], text, (Asked(entry["question"].strip(), answers),)))
        except (ValueError, KeyError, TypeError, StopIteration) as error:
            raise InputError(
                f"line {number} of {path} must be a question of NaturalQuestions with its gold passage: {error!r}"
            ) from error
    return contexts
