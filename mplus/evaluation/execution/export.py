"""Questions as a file of JSON lines, for arms that run elsewhere (``benchmarks/snapkv``)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from mplus.evaluation.generating import Generation
from mplus.evaluation.tasks.base import Episode

FORMAT = 1


def exported(
    episodes: Sequence[Episode], ages: Sequence[int], generation: Generation, separator: str
) -> list[dict[str, Any]]:
    """Return the lines of a file of questions: first how to answer, with a digest of all, then one line per episode."""
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
