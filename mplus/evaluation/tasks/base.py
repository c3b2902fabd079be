"""Task: what a stream is told, one passage per write, and what it is asked about it later."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import attrs
from attrs import define, field

from mplus.config import JsonValue, whole
from mplus.errors import InputError
from mplus.evaluation.texts import Texts


@define(frozen=True, kw_only=True)
class Passage:
    """One text that is told, at most one chunk long, under the name ``source``."""

    text: str
    source: str


@define(frozen=True, kw_only=True)
class Question:
    """Something to ask.

    Attributes:
        prompt: what the decoder is given, complete.
        answers: accepted answers.
        needs: numbers of the passages that hold the answer; empty: it was never told.
        after: number of the passage that age is counted from: at age n, n passages have been told since.
        ages: the ages it is asked at; None: all that the evaluation asks at.
        category: of questions that are told apart in reports; None: there is one kind only.
    """

    prompt: str
    answers: tuple[str, ...]
    needs: tuple[int, ...]
    after: int
    ages: tuple[int, ...] | None = None
    category: str | None = None

    @property
    def told(self) -> bool:
        """Return whether the answer is in the passages at all."""
        return bool(self.needs)


@define(frozen=True, kw_only=True)
class Episode:
    """One stream: ``passages`` are told in order; a question is asked at every age that there are passages for."""

    number: int
    passages: tuple[Passage, ...]
    questions: tuple[Question, ...]

    def __attrs_post_init__(self) -> None:
        last = len(self.passages) - 1
        for question in self.questions:
            if not 0 <= question.after <= last or not all(0 <= need <= question.after for need in question.needs):
                raise InputError(
                    f"a question must need passages up to the one that its age is counted from, and that one must be "
                    f"among the {len(self.passages)} of the episode, got needs {question.needs}, after {question.after}"
                )


def tokens_by_age(episodes: Sequence[Episode], ages: Sequence[int], texts: Texts) -> dict[int, float]:
    """Return, by age, the mean number of text tokens told after the passage that it is counted from."""
    found: dict[int, list[int]] = {age: [] for age in ages}
    for episode in episodes:
        for question in episode.questions:
            for age in ages:
                since = episode.passages[question.after + 1 : question.after + 1 + age]
                if question.told and len(since) == age:
                    found[age].append(sum(texts.count(passage.text) for passage in since))
    return {age: sum(counts) / len(counts) for age, counts in found.items() if counts}


class Task(ABC):
    """Makes the episodes of an evaluation; equal settings give equal episodes.

    Attributes:
        name: as in reports.
        answer_tokens: tokens that are generated for an answer unless the user says otherwise.
        passages: told from the needed one on, that one included; the greatest age is one less.
        passage_tokens: most tokens of a passage.
        ages: the ages to ask at unless the user says otherwise; None: 0, 1, 2, 4, 8 and so on.
        untold: whether some questions are about what was never told.
        seed: of everything that is drawn.
    """

    name: ClassVar[str]
    answer_tokens: int
    ages: tuple[int, ...] | None = None

    @property
    @abstractmethod
    def passages(self) -> int:
        """Return the passages told from the needed one on."""

    @property
    @abstractmethod
    def passage_tokens(self) -> int:
        """Return the most tokens of a passage."""

    @property
    @abstractmethod
    def untold(self) -> bool:
        """Return whether some questions are about what was never told."""

    @property
    @abstractmethod
    def seed(self) -> int:
        """Return the seed of everything that is drawn."""

    @abstractmethod
    def episodes(self) -> list[Episode]:
        """Return all episodes.

        Raises:
            InputError: the data cannot be read, has another format, or has nothing that fits; says what.
        """

    @abstractmethod
    def settings(self) -> dict[str, JsonValue]:
        """Return every setting as plain data."""

    @property
    def deviations(self) -> tuple[str, ...]:
        """Return where it differs from what was published."""
        return ()

    @property
    def chance(self) -> float | None:
        """Return the accuracy of guessing; None where there is no such number. Known once there are episodes."""
        return None


class Protocol(Task):
    """Makes the episodes of a data set, or of generated texts. Built as ``Protocol(options, texts)``."""

    @define(frozen=True, kw_only=True)
    class Options:
        """Options of every protocol.

        Attributes:
            episodes: how many to make; fewer where the data has no more.
            passages: passages told from the needed one on, that one included; the greatest age is one less.
            before: passages of distraction told before it.
            passage_tokens: most tokens of a passage; longer ones are left out where they hold an answer, else cut.
            questions: questions about what was told, per episode.
            untold: questions per episode whose answer was not told.
            seed: of everything that is drawn.
        """

        episodes: int = field(default=100, validator=whole(1))
        passages: int = field(default=33, validator=whole(1))
        before: int = field(default=0, validator=whole(0))
        passage_tokens: int = field(default=512, validator=whole(1))
        questions: int = field(default=1, validator=whole(1))
        untold: int = field(default=0, validator=whole(0))
        seed: int = field(default=0, validator=whole(0))

    answer_tokens: int = 10

    def __init__(self, options: Protocol.Options, texts: Texts) -> None:
        self.options = options
        self.texts = texts

    @property
    def passages(self) -> int:
        return int(self.options.passages)

    @property
    def passage_tokens(self) -> int:
        return int(self.options.passage_tokens)

    @property
    def untold(self) -> bool:
        return bool(self.options.untold)

    @property
    def seed(self) -> int:
        return int(self.options.seed)

    def settings(self) -> dict[str, JsonValue]:
        """Return every option as plain data; files by name only, since where they lie means nothing elsewhere."""
        plain = attrs.asdict(self.options)
        return {name: value.name if isinstance(value, Path) else value for name, value in plain.items()}


@define(frozen=True, kw_only=True)
class FileOptions(Protocol.Options):
    """Besides what every protocol can be told, ``data``: the file or folder to read."""

    data: Path = field(converter=Path)
