"""Arm of an evaluation: one way of answering what was told some time ago."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from mplus.evaluation.execution.base import Answer, Due, Execution, Moment


class EvaluationArm(ABC):
    """One way of answering. Built with an execution and its own settings.

    Attributes:
        name: as in reports.
    """

    name: ClassVar[str]

    def __init__(self, execution: Execution[Any, Any]) -> None:
        self.execution = execution

    @abstractmethod
    def answers(self, moment: Moment, due: Sequence[Due]) -> list[Answer | None]:
        """Answer ``due`` questions of a moment; None where this arm cannot, because something does not fit."""

    def settings(self) -> dict[str, Any]:
        """Return the arm's own settings, as plain data."""
        return {}


class MemoryArm(EvaluationArm):
    """Reads memory in a ``way`` of the execution; all memory arms have the same weights and rows."""

    def __init__(self, execution: Execution[Any, Any], name: str, way: object) -> None:
        super().__init__(execution)
        self.name = name  # type: ignore[misc]
        self.way = way

    def answers(self, moment: Moment, due: Sequence[Due]) -> list[Answer | None]:
        return list(self.execution.read(moment, due, self.way))
