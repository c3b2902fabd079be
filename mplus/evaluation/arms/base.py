"""Arm of the harness over natural text: one way of answering what was told some time ago."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from attrs import define

from mplus.evaluation.generating import Generated, Generation
from mplus.evaluation.tasks.base import Episode, Question
from mplus.evaluation.texts import Texts
from mplus.memory.memory import Memory

ID_BYTES = 8
"""Bytes of a token id that is kept as text."""


@define(frozen=True, eq=False)
class Bench:
    """What all arms share.

    Attributes:
        model: the wrapped decoder, in eval mode.
        tokenizer: its tokenizer.
        texts: counts by it.
        generation: how answers are generated.
        separator: between passages, and between the last one and the question, where they are read as one text.
    """

    model: Any
    tokenizer: Any
    texts: Texts
    generation: Generation
    separator: str


@define(frozen=True, eq=False)
class Due:
    """A question that is asked now.

    Attributes:
        row: the batch row of its stream.
        number: of the question in its episode.
        age: passages told since the one that age is counted from.
    """

    episode: Episode
    row: int
    number: int
    age: int

    @property
    def question(self) -> Question:
        """The question."""
        return self.episode.questions[self.number]

    @property
    def told(self) -> int:
        """Passages told so far."""
        return self.question.after + self.age + 1

    @property
    def id(self) -> str:
        """``episode-question-age``, unique in a run."""
        return f"{self.episode.number}-{self.number}-{self.age}"

    def sources(self) -> set[str]:
        """Names of the passages that hold the answer."""
        return {self.episode.passages[need].source for need in self.question.needs}


@define(frozen=True, eq=False)
class Reply:
    """An answer.

    Attributes:
        text: before stop strings are looked for.
        state_bytes: bytes kept between telling and asking.
        tokens_attended: rows and tokens in sight of the first token of the answer.
        generated: the details; None where it was generated elsewhere.
    """

    text: str
    state_bytes: int | None
    tokens_attended: int | None
    generated: Generated | None = None


class TextArm(ABC):
    """One way of answering. Built with a ``Bench`` and its own settings.

    Attributes:
        name: as in reports.
    """

    name: ClassVar[str]

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    @abstractmethod
    def reply(self, due: Sequence[Due], memory: Memory) -> list[Reply | None]:
        """Answer questions; None where this arm cannot answer one, because something does not fit.

        Args:
            due: the questions.
            memory: all streams as they are now; read only.
        """

    def settings(self) -> dict[str, Any]:
        """The arm's own settings, as plain data."""
        return {}
