"""Arms that read text in the place of memory: the right text alone, and the chunks that a memory chooses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, cast

from attrs import evolve

from mplus.evaluation.arms import TextArm
from mplus.evaluation.execution.base import Answer, Due, Execution, M, W
from mplus.evaluation.execution.generated import GeneratedAnswers
from mplus.evaluation.execution.telling import MemoryMoment


class Ceiling(TextArm[M, W]):
    """The passages that the answer needs, and nothing else: what the decoder makes of the right text.

    Args:
        execution: of the evaluation.
        positions: of the decoder; a question whose passages do not fit is not answered. None: no limit.
    """

    name: ClassVar[str] = "ceiling"
    uses_labels = True

    def __init__(self, execution: Execution[M, W], positions: int | None = None) -> None:
        super().__init__(execution)
        self.positions = positions

    def context(self, due: Due) -> list[int] | None:
        ids = [token for need in due.question.needs for token in self.execution.passage(due, need)]
        room = len(ids) + len(self.execution.question(due)) + self.execution.answer_tokens
        return ids if self.positions is None or room <= self.positions else None

    def kept_tokens(self, due: Due) -> int:
        return sum(len(self.execution.passage(due, need)) for need in due.question.needs)


class ChosenText(TextArm[M, W]):
    """The tokens of the chunks that the memory chooses, in the same order and place, read as text.

    Beside the arm that reads their rows it tells what keeping rows costs or gains; all that is told is kept as text.
    """

    def __init__(self, execution: Execution[M, W], name: str) -> None:
        super().__init__(execution)
        self.name = name  # type: ignore[misc]
        self._chosen: dict[str, list[int]] = {}

    def answers(self, moment: M, due: Sequence[Due]) -> list[Answer | None]:
        generated = cast("GeneratedAnswers", self.execution)  # no other has chunks
        choices = generated.choose(cast("MemoryMoment", moment), due)
        self._chosen = {one.id: list(choice.ids) for one, choice in zip(due, choices, strict=True)}
        made = super().answers(moment, due)
        return [
            None if answer is None else evolve(answer, choice=choice)
            for answer, choice in zip(made, choices, strict=True)
        ]

    def context(self, due: Due) -> list[int]:
        return self._chosen[due.id]

    def kept_tokens(self, due: Due) -> int:
        return self.told_tokens(due)
