"""SnapKV, whose package wants other versions than mplus: questions go out as JSONL, answers come back as JSONL."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import attrs

from mplus.errors import InputError
from mplus.evaluation.arms.base import Bench, Due, Reply, TextArm
from mplus.evaluation.generating import Generation
from mplus.evaluation.tasks.base import Episode
from mplus.evaluation.texts import read
from mplus.memory.memory import Memory

FORMAT = 1


def exported(
    episodes: Sequence[Episode], ages: Sequence[int], generation: Generation, separator: str
) -> list[dict[str, Any]]:
    """The lines of a file of questions: first how to answer, with a digest of all, then one line per episode."""
    lines = [
        {
            "episode": episode.number,
            "passages": [passage.text for passage in episode.passages],
            "questions": [
                {
                    "number": number,
                    "prompt": question.prompt,
                    "after": question.after,
                    "ages": [age for age in ages if question.after + age < len(episode.passages)],
                }
                for number, question in enumerate(episode.questions)
            ],
        }
        for episode in episodes
    ]
    how = {"format": FORMAT, "separator": separator, "generation": attrs.asdict(generation)}
    text = json.dumps([how, lines], sort_keys=True)
    return [{**how, "digest": hashlib.sha256(text.encode()).hexdigest()}, *lines]


def export(path: str | Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write the file that ``benchmarks/snapkv`` answers."""
    Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


class SnapKV(TextArm):
    """Looks up answers that were generated elsewhere.

    Args:
        bench: what all arms share.
        answers: the file of answers.
        questions: what ``exported`` gives for this run.

    Raises:
        InputError: the file answers other questions, or not all of these.
    """

    name: ClassVar[str] = "snapkv"

    def __init__(self, bench: Bench, answers: Path, questions: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(bench)
        head, *lines = _lines(answers)
        if head.get("digest") != questions[0]["digest"]:
            raise InputError(
                f"{answers} must answer the questions of this run, but theirs have another digest: export the "
                "questions again with the same data, seed, ages and settings, and answer those"
            )
        self.facts: dict[str, Any] = {name: value for name, value in head.items() if name not in {"digest", "format"}}
        self._replies = {
            line["id"]: Reply(line["text"], line["state_bytes"], line["tokens_attended"]) for line in lines
        }
        missing = [name for name in _ids(questions) if name not in self._replies]
        if missing:
            raise InputError(
                f"{answers} must answer every question, {len(missing)} are missing, the first {missing[0]}"
            )

    def reply(self, due: Sequence[Due], memory: Memory) -> list[Reply | None]:
        return [self._replies[one.id] for one in due]

    def settings(self) -> dict[str, Any]:
        return self.facts


def _ids(questions: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for line in questions[1:]:
        for question in line["questions"]:
            for age in question["ages"]:
                yield f"{line['episode']}-{question['number']}-{age}"


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        lines = [json.loads(line) for line in read(path).splitlines()]
        complete = all({"id", "text", "state_bytes", "tokens_attended"} <= line.keys() for line in lines[1:])
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path} must have one JSON object a line: {error}") from error
    if not lines or lines[0].get("format") != FORMAT or not complete:
        raise InputError(f"{path} must be a file of answers in format {FORMAT}, as benchmarks/snapkv writes it")
    return lines
