"""The part of the page on chat models that says whether trained maps find more than ``hybrid``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.pages.markdown import measured_on, table

PLAIN = ("words", "hidden", "hybrid")


def trained_maps(record: Mapping[str, Any]) -> str:
    """Return the section of the record of trained maps."""
    head = ["tried on", "trained on", "retriever", "questions", "at 1", "over `hybrid`", "at 4", "over `hybrid`"]
    rows = []
    for name, part in record.items():
        if not isinstance(part, dict) or "text" not in part:
            continue
        rows += [[name, "", retriever, *_cells(part["text"], retriever)] for retriever in PLAIN]
        for trained, facts in part.items():
            rows += [[name, trained, one, *_cells(facts, one)] for one in ("trained", "hybrid with trained")]
    pairs = {name: record[f"trained on {name}"]["pairs"]["trained"] for name in ("text", "text and questions")}
    opening = (
        f"`{record['decoder']}`. Maps of `mplus train-retriever`, trained on {pairs['text']:,} sentences cropped out "
        f"of novels, and on {pairs['text and questions']:,} pairs of these and of SQuAD questions about 20 other "
        "articles; tried on what they never saw. Recall of the right passage among the best, before any reordering; "
        "the difference to `hybrid` without maps, question by question, with its 95 % interval."
    )
    where = measured_on(record, "quality/trained_retriever")
    verdict = _verdict(record)
    return "\n\n".join(["## Does a trained retriever find more?", opening, table(head, rows, 3), verdict, where])


def _cells(facts: Mapping[str, Any], retriever: str) -> list[str]:
    cells = [f"{facts['questions']:,}"]
    for depth in (1, 4):
        over = facts[retriever].get(f"over_hybrid_at_{depth}")
        shown = "" if over is None else f"{over['value']:+.3f} ({over['low']:+.3f} to {over['high']:+.3f})"
        cells += [f"{facts[retriever][f'recall_at_{depth}']:.3f}", shown]
    return cells


def _verdict(record: Mapping[str, Any]) -> str:
    """Say whether ``hybrid`` with maps is better than without by more than chance, everywhere."""
    overs = [
        facts["hybrid with trained"]["over_hybrid_at_1"]
        for part in record.values()
        if isinstance(part, dict) and "text" in part
        for facts in part.values()
    ]
    better, worse = sum(over["low"] > 0 for over in overs), sum(over["high"] < 0 for over in overs)
    ships = "so they come with mplus" if better == len(overs) else "so none come with mplus"
    return (
        f"Of {len(overs)} comparisons, `hybrid` with maps puts the right passage first more often than without in "
        f"{better}, and less often in {worse}, by more than chance; {ships}."
    )
