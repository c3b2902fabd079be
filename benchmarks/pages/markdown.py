"""Parts of the pages in Markdown: tables, and the line that says on what a record was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def table(head: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """Return a table whose first ``text_columns`` columns are text and whose others are numbers."""
    rule = ["---"] * text_columns + ["---:"] * (len(head) - text_columns)
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *rows])


def measured_on(record: Mapping[str, Any], source: str = "", *more: str) -> str:
    """Return the device, versions and commit of a record, and ``more``, as a sentence.

    ``source``, such as "speed/overhead", adds a sentence that names the file with every number.
    """
    where = record.get("circumstances", record)
    found = ", ".join([where["device"], f"torch {where['torch']}", f"commit {where['commit']}", *more])
    kind, _, name = source.partition("/")
    return f"{found}. Every number: `benchmarks/{kind}/records/{name}.json`." if source else f"{found}."
