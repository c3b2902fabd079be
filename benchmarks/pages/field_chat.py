"""The part of ``docs/field.md`` about a chat model that nothing was trained for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.pages.markdown import measured_on, table
from mplus.evaluation.reports.cell import wilson
from mplus.evaluation.reports.report import Report

TITLES = {
    "notes": "notes, as they are",
    "dictated": "notes, as triples by hand",
    "written": "notes, as triples that it writes",
    "squad": "paragraphs of SQuAD",
}
READINGS = {
    "none": "what the decoder knows by itself: nothing of invented people.",
    "ceiling": "the right passage alone, as text: the most that a memory can be worth to this decoder.",
    "bm25": "the passage that shares most words with the question, as text.",
    "kv": "works untrained: what it brings back is read as if it stood in the prompt. It pays in bytes.",
    "memlong": "does not work untrained: layers that never saw keys and values from another layer's place make nothing "
    "of them, whatever is found. It needs its training of the upper layers.",
    "scm": "works untrained with its decisions off: a stream of turns and a search by words. It is read as text among "
    "its neighbours, which this decoder mixes up.",
    "retllm": "the table works where somebody writes the triples, and a call that is held to what is stored is made "
    "without training, though often not the right one.",
    "memllm": "as `retllm`, with calls that name relation and subject, which this decoder chooses better.",
}
"""A plain reading of each arm, for this decoder."""


def chat_sections(record: Mapping[str, Any]) -> str:
    """Return what the memories that run untrained are worth to a chat model, what they cost, and a plain reading."""
    parts = {name: record[name] for name in TITLES if name in record}
    first = next(iter(parts.values()))
    model = first["circumstances"]["model"]
    opening = (
        f"`{model}`, of 135M parameters, as people have it: nothing is trained. Right answers of all, greedy, "
        "where the answer holds the right words, with the 95 % interval of their share; the samples are small. In "
        "brackets, of how many questions the needed passage came back. The notes are of the split `unseen`."
    )
    names = dict.fromkeys(arm["name"] for part in parts.values() for arm in part["arms"])
    rows = [[f"`{name}`", *(_cell(part, name) for part in parts.values())] for name in names]
    notes = (
        "`hmt`, `longmem` and `lamemo` have parameters that are trained with the decoder, and no training of an hour "
        "on a CPU was tried for one of this size: they are not here. An empty place: not asked."
    )
    lines = "\n".join(f"- **`{name}`**: {READINGS[name]}" for name in names)
    where = measured_on(first, "quality/field-chat")
    head = ["memory", *(f"{TITLES[name]}" for name in parts)]
    return "\n\n".join(
        ["## On a chat model, untrained", opening, table(head, rows), notes, lines, _costs(list(parts.values())), where]
    )


def _cell(part: Mapping[str, Any], name: str) -> str:
    """Return right answers of all, their interval, and how often the needed passage came back."""
    arm = next((one for one in Report.from_plain(part).arms if one.name == name and one.cells), None)  # type: ignore[arg-type]
    if arm is None:
        return ""
    [cell] = arm.cells
    low, high = wilson(cell.correct, cell.questions)
    recall = "" if cell.recall is None else f" [{round(cell.recall * cell.questions)}]"
    return f"{cell.correct}/{cell.questions}{recall} ({low:.2f}-{high:.2f})"


def _costs(parts: Sequence[Mapping[str, Any]]) -> str:
    """Tabulate bytes, tokens attended and tokens through the decoder, of each arm in the first part that has it."""
    rows, costs = [], {name: own for part in reversed(parts) for name, own in part["costs"].items()}
    for arm in (arm for at, part in enumerate(parts) for arm in part["arms"] if not _had(parts[:at], arm["name"])):
        own = costs.get(arm["name"])
        cells = ["-", "-"]
        if own is not None:
            cells = [f"{own['layer_tokens_per_token_written']:.1f}", f"{own['layer_tokens_per_question']:.0f}"]
        known = (arm.get("state_bytes"), arm.get("tokens_attended"))
        rows.append([f"`{arm['name']}`", *("-" if one is None else f"{one:,}" for one in known), *cells])
    asked = next(iter(parts[0]["costs"].values()))["question_tokens"]
    opening = (
        f"What it takes, counted as above; a question has {asked:.0f} tokens itself with the template around it. A "
        "memory of triples lets the decoder read each question once more, behind examples, to make its call; triples "
        "that are written by hand go through no layer."
    )
    head = ["memory", "state bytes", "tokens attended", "written: per token", "read: per question"]
    return "\n\n".join([opening, table(head, rows)])


def _had(parts: Sequence[Mapping[str, Any]], name: str) -> bool:
    """Return whether one of the parts has an arm of this name."""
    return any(arm["name"] == name for part in parts for arm in part["arms"])
