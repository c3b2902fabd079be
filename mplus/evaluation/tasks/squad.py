"""SQuAD: a paragraph is told, then paragraphs of other articles, then a question about the first."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from attrs import define, field

from mplus.config import one_of
from mplus.errors import InputError
from mplus.evaluation.tasks.base import Episode
from mplus.evaluation.tasks.contexts import Asked, Context, ContextOptions, ContextProtocol
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
