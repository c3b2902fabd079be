"""The part of the page on chat models that says whether the right chunk is found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.pages.markdown import measured_on, table

RETRIEVERS = ("words", "hidden", "hybrid")
COLUMNS = ("recall_at_1", "recall_at_4", "told_rejected", "untold_rejected", "auroc")


def found_chunks(record: Mapping[str, Any]) -> str:
    """Return the section of the record of chunk retrievers."""
    rows = []
    for name, part in record.items():
        if isinstance(part, dict) and "told" in part:
            for retriever in RETRIEVERS:
                facts = part[retriever]
                cells = [f"{facts[column]:.2f}" if column in facts else "" for column in COLUMNS]
                asked = part.get("with_instruction", {}).get(retriever, {}).get("recall_at_1")
                cells.insert(1, "" if asked is None else f"{asked:.2f}")
                rows.append([name, retriever, f"{part['told']} + {part['untold']}", *cells])
    head = ["chunks", "retriever", "asked, told + untold", "at 1", "with an instruction", "at 4"]
    head += ["told, rejected", "untold, rejected", "AUROC of the best score"]
    opening = (
        f"`{record['decoder']}`, nothing trained and nothing answered. Recall of the right chunk among the best, by "
        "each chunk retriever, before any reordering; the share of questions for which nothing passes the threshold; "
        "and how well the best score tells what was told. Half of the untold questions are about something else of "
        "people in the notes. Where notes changed, only the newest is right."
    )
    where = measured_on(record, "quality/chunk_retrieval")
    return "\n\n".join(["## Is the right chunk found?", opening, table(head, rows, text_columns=2), where])
