"""SnapKV, whose package wants other versions than mplus: its answers to exported questions come back as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, TypedDict

from mplus.config import JsonValue
from mplus.errors import InputError
from mplus.evaluation.arms import EvaluationArm
from mplus.evaluation.execution.base import Answer, Due
from mplus.evaluation.execution.generated import GeneratedAnswers
from mplus.evaluation.execution.telling import MemoryMoment
from mplus.evaluation.generating import FORMAT
from mplus.evaluation.retriever_swap import Way
from mplus.evaluation.texts import read


class ExportedAnswer(TypedDict):
    """A line of a file of answers, but for the first."""

    id: str
    text: str
    state_bytes: int
    tokens_attended: int


class SnapKV(EvaluationArm[MemoryMoment, Way]):
    """Looks up answers that were generated elsewhere.

    Args:
        execution: of the evaluation.
        answers: the file of answers.

    Raises:
        InputError: the file answers other questions, or not all of these.
    """

    name: ClassVar[str] = "snapkv"

    def __init__(self, execution: GeneratedAnswers, answers: Path) -> None:
        super().__init__(execution)
        self._judged, (asked, episodes) = execution.judged, execution.exported()
        head, lines = _lines(answers)
        if head.get("digest") != asked["digest"]:
            raise InputError(
                f"{answers} must answer the questions of this run, but theirs have another digest: export the "
                "questions again with the same data, seed, ages and settings, and answer those"
            )
        self.facts: dict[str, JsonValue] = {
            name: value for name, value in head.items() if name not in {"digest", "format"}
        }
        self._lines = {line["id"]: line for line in lines}
        names = [
            f"{line['episode']}-{question['number']}-{age}"
            for line in episodes
            for question in line["questions"]
            for age in question["ages"]
        ]
        missing = [name for name in names if name not in self._lines]
        if missing:
            raise InputError(
                f"{answers} must answer every question, {len(missing)} are missing, the first {missing[0]}"
            )

    def answers(self, moment: MemoryMoment, due: Sequence[Due]) -> list[Answer | None]:
        lines = [self._lines[one.id] for one in due]
        return [
            self._judged(one, line["text"], line["state_bytes"], line["tokens_attended"])
            for one, line in zip(due, lines, strict=True)
        ]

    def settings(self) -> dict[str, JsonValue]:
        return self.facts


def _lines(path: Path) -> tuple[dict[str, JsonValue], list[ExportedAnswer]]:
    try:
        lines = [json.loads(line) for line in read(path).splitlines()]
        complete = all({"id", "text", "state_bytes", "tokens_attended"} <= line.keys() for line in lines[1:])
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path} must have one JSON object a line: {error}") from error
    if not lines or lines[0].get("format") != FORMAT or not complete:
        raise InputError(f"{path} must be a file of answers in format {FORMAT}, as benchmarks/snapkv writes it")
    return lines[0], lines[1:]
