"""The page ``docs/benchmarks/chat.md``: what memories are worth to a chat model that people have, untrained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.pages.chat_harm import unharmed
from benchmarks.pages.chunks import found_chunks
from benchmarks.pages.markdown import measured_on, table
from benchmarks.pages.trained_maps import trained_maps
from benchmarks.records import ROOT, load, record_path
from mplus.evaluation.reports.paired import outcomes, ratio
from mplus.evaluation.reports.report import Report
from mplus.evaluation.reports.worth import worth_remarks, worth_tables

PAGE = ROOT / "docs" / "benchmarks" / "chat.md"
PREAMBLE = """
# Chat models

What a memory is worth to a chat model as people have it, untrained. This page is made from
`benchmarks/quality/records/chat-*.json` by `python -m benchmarks.pages`. How to read it, and how to measure your own
model: [Evaluation](../evaluation.md#a-chat-model).
"""
TITLES = {
    "notes": "Notes about invented people",
    "notes-fresh": "Notes about people and things that nothing was tried on",
    "notes-unseen": "Notes about other people, on which settings were tried later",
    "notes-among": "A thousand notes among novels",
    "notes-changing": "Notes of which half change",
    "needles": "Needles in novels",
    "conversations": "Conversations over many sessions",
    "squad": "Paragraphs of SQuAD",
    "natural-questions": "Gold passages of NaturalQuestions",
    "babi": "Little stories in novels",
}
AIM = 0.95
"""Share of the ceiling that the project wants of a memory of notes."""


def render() -> str:
    """Return the page."""
    parts = [PREAMBLE.strip()]
    for name in TITLES:
        if record_path("quality", f"chat-{name}").is_file():
            parts.append(section(name, load("quality", f"chat-{name}")))
        if record_path("quality", f"chat-{name}-search").is_file():
            parts.append(search(name, load("quality", f"chat-{name}-search")))
    if record_path("quality", "chat-harm").is_file():
        parts.append(unharmed(load("quality", "chat-harm")))
    if record_path("quality", "chunk_retrieval").is_file():
        parts.append(found_chunks(load("quality", "chunk_retrieval")))
    if record_path("quality", "trained_retriever").is_file():
        parts.append(trained_maps(load("quality", "trained_retriever")))
    return "\n\n".join(parts) + "\n"


def section(name: str, record: Mapping[str, Any]) -> str:
    """Return the section of one record: tables, what they show, and on what they were measured."""
    report = Report.from_plain(record)  # type: ignore[arg-type]  # a report with facts beside it
    parts = [f"## {TITLES[name]}", opening(report)]
    for title, (head, rows) in worth_tables(report).items():
        parts += [f"{title}:".capitalize(), table(head, rows)]
    parts += [shown(report), "\n".join(f"- {remark}" for remark in worth_remarks(report))]
    parts.append(measured_on(record, f"quality/chat-{name}", busy(record)))
    return "\n\n".join(parts)


def busy(record: Mapping[str, Any]) -> str:
    """Return how many programs wanted to run besides."""
    before, after = record["load_average"]
    longer = " (above the number of cores: times are longer than on a quiet machine)" if max(before, after) > 2 else ""
    return f"load average {before} before and {after} after{longer}"


def search(name: str, record: Mapping[str, Any]) -> str:
    """Return the section of a record of searches."""
    options = record["settings"]["protocol"]
    rows = []
    for label, facts in record["memories"].items():
        shares = [facts["recall_at"][depth] for depth in ("1", "2", "4", "8")]
        signs = [facts["told_rejected"], facts.get("untold_rejected"), facts.get("auroc_of_score")]
        cells = [f"{share:.3f}" if share is not None else "-" for share in (*shares, *signs)]
        rows.append([label, str(facts["questions"]), *cells, f"{facts['search_ms']:.0f}"])
    head = ["memory", "questions", *(f"at {depth}" for depth in (1, 2, 4, 8))]
    head += ["told, rejected", "untold, rejected", "AUROC of the score", "ms of a search"]
    told = ", ".join(f"{key} `{value}`" for key, value in options.items() if value is not None)
    opening_ = f"Is all that a question needs among the best chunks? Nothing is answered. Told and asked: {told}."
    digests = "\n".join(f"- config of {label}: digest {facts['digest']}" for label, facts in record["memories"].items())
    where = measured_on(record, f"quality/chat-{name}-search", busy(record))
    return "\n\n".join([f"## {TITLES[name]}: searches", opening_, table(head, rows), digests, where])


def opening(report: Report) -> str:
    """Return what was told and asked."""
    settings: dict[str, Any] = dict(report.settings)
    options = ", ".join(f"{key} `{value}`" for key, value in settings["protocol"].items() if value is not None)
    return (
        f"`{report.circumstances['model']}`, greedy answers of at most {settings['generation']['tokens']} tokens, "
        f"right where they have the answer in whole words. Episodes: {settings['episodes']}; {options}."
    )


def shown(report: Report) -> str:
    """Return a sentence for each memory: what it answers beside the ceiling, and beside all of the text."""
    arms = {arm.name: outcomes(arm) for arm in report.arms if arm.status == "ok"}
    lines = []
    for label in report.settings["memory"]:  # type: ignore[union-attr]  # a table of configurations
        found = ratio(arms[label], arms["ceiling"]) if label in arms and "ceiling" in arms else None
        if found is not None:
            reached = "reached" if found.value >= AIM else "not reached"
            lines.append(
                f"- `{label}` answers {found.value:.2f} of what the right text alone answers (95 % interval "
                f"{found.low:.2f} to {found.high:.2f}); the aim of {AIM} is {reached}."
            )
    return "\n".join(lines)
