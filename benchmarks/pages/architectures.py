"""The page ``docs/architectures.md``: which decoders can carry a memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.quality.architectures.decoders import ARCHITECTURES
from benchmarks.quality.architectures.measure import COLUMNS
from benchmarks.records import ROOT, load

PAGE = ROOT / "docs" / "architectures.md"


def render() -> str:
    """Return the page."""
    record = load("quality", "architectures")
    newest = max(record, key=lambda v: tuple(map(int, v.split(".")[:3])))
    run = record[newest]
    lines = [
        SUMMARY.strip(),
        "",
        *_summary(run["rows"]),
        "",
        PREAMBLE.strip(),
        "",
        f"Measured with transformers {newest}, torch {run['torch']}, {run['device']}, on {run['date']}.",
        f"With transformers {', '.join(v for v in sorted(record) if v != newest)} all stay within the same tolerances.",
        "Every number: `benchmarks/quality/records/architectures.json`.",
        "",
        "| decoder | attention | positions | moves logits by | read | retrieve | step | write | rows | generation |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    notes, hidden = [], []
    for architecture in ARCHITECTURES:
        row = run["rows"][architecture.name]
        name = f"`{architecture.model_type}`" + (
            f" ({architecture.name})" if architecture.name != architecture.model_type else ""
        )
        if "refused" in row:
            notes.append(f"- {name}: {row['refused']}")
            continue
        if row["hidden_only"] is not None:
            hidden.append(f"- {name}: {row['hidden_only']}")
        technique = "registered function" if row["technique"] == "attention" else "cache view"
        cells = [f"{row[column]:.0e}" if row[column] is not None else "–" for column in COLUMNS]
        moved = "–" if row["moved"] is None else f"{row['moved']:.1f}"
        searches = ", ".join(row["generate"]) if row["generate"] is not None else "–"
        attention = f"{technique} ({', '.join(row['implementations'])})"
        positions = "–" if architecture.positions in {"learned", "none"} else row["positions"]
        lines.append(f"| {name} | {attention} | {positions} | {moved} | " + " | ".join(cells) + f" | {searches} |")
    kept = ["", "## Rows kept as hidden states only", "", HIDDEN.strip(), "", *hidden]
    return "\n".join([*lines, *kept, "", "## Refused", "", *notes, "", NOTES.strip(), ""])


def _summary(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a table that names the decoders by what came out."""
    found: dict[str, dict[str, None]] = {answer: {} for answer in ANSWERS.values()}
    for architecture in ARCHITECTURES:
        row = rows[architecture.name]
        found[ANSWERS["refused" if "refused" in row else row["technique"]]][f"`{architecture.name}`"] = None
    return [
        "| | decoders |",
        "| --- | --- |",
        *(f"| {answer} | {', '.join(names)} |" for answer, names in found.items()),
    ]


ANSWERS = {
    "attention": "works",
    "cache_view": "works, with memory in a view of the key/value cache",
    "refused": "refused",
}
"""The technique of a record, or "refused": the words of the table."""

HIDDEN = """
Elsewhere a memory can keep the keys and values of its rows (`memory_rows`), and no read projects them again. Here every
read projects the rows that it sees, for these reasons:
"""


SUMMARY = """
# Architectures

Does your decoder work with a memory? `mplus.wrap` finds out by running it; no list of names decides it.
A decoder whose layers cannot carry a memory is refused with the reasons. (A [memory of
text](details/notes.md) works with every decoder that generates.) These were tried:
"""

PREAMBLE = """
## How it is measured

The decoders are tested with every change, as tiny random models in float32 whose logits have a standard deviation of
one to three, against the *placeholder oracle*: the unmodified decoder, run over one extra position per memory row,
whose hidden states are overwritten before every layer.

The numbers are largest absolute errors of the logits (of the new rows, for writes) over all attention implementations.
Allowed are 2e-05, for hybrids 1e-04.

- **moves logits by**: how much reading the memory changes them; below 1 a comparison would mean little.
- **read**: short-term memory in front of the text equals the oracle. For hybrids, which have no oracle: the registered
  attention function equals the cache view.
- **retrieve**: short-term memory and retrieved long-term rows equal the oracle.
- **step**: prefill and cached steps equal one full forward.
- **write**: the rows written by chunks longer than, equal to and shorter than the rows per chunk equal the oracle's.
- **rows**: a left-padded batch with unequal memories equals each row alone.
- **generation**: the same tokens with and without a cache, in a padded batch and (but for sampling) alone.
"""

NOTES = """
## Notes

- *Cache view*: these decoders compute attention themselves; memory is shown to them through the key/value cache, and a
  named attention backend is refused.
- *Positions*: rotary embeddings are relative, so memory sits at negative positions and text stays where it was. Where
  frequencies depend on the largest position (dynamic NTK, longrope), memory comes first and text is moved behind it
  ("offset"); cached and full computation then differ with or without memory, and a row of a batch from the row alone,
  hence the dashes. Where order does not enter attention (learned positions, or none)
  memory has no positions, shown by a dash. With ALiBi memory sits right in front of the text
  ("constant") unless the config says otherwise; it is measured here as "sequential", which the oracle knows.
- *Hybrids* (attention in some layers only) carry memory in their attention layers. A chunk shorter than the rows per
  chunk writes one row per token there instead of re-encoding older rows.
- Mixture-of-experts blocks get no LoRA adapters by default, their routers and experts are not plain projections.
"""
