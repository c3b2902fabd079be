"""Write ``docs/speed.md`` and its figures from the records of ``mplus bench``.

mplus bench read --json benchmarks/speed/records/bench-read-cpu.json
python -m benchmarks.pages.speed

Every ``bench-*.json`` in the folder becomes a section; commit before measuring, so that the record names the commit.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.records import ROOT
from mplus.bench.tables import Sheet, opening, refused, sheets

RECORDS = ROOT / "benchmarks" / "speed" / "records"
PAGE = ROOT / "docs" / "speed.md"
FIGURES = ROOT / "docs" / "assets"
HEADINGS = {
    "read": "Reading a prompt",
    "decode": "Single tokens",
    "write": "Writing",
    "score": "Scoring long-term rows",
    "attention": "Attention alone",
    "store": "Appending, evicting, merging",
}
PREAMBLE = """
# Speed

What was measured, and nothing else; this page is made from `benchmarks/speed/records` by
`python -m benchmarks.pages.speed`, and the records by
[`mplus bench read`](cli.md#mplus-bench-read) and its siblings. Decoders have random weights and
memories random rows: what a read costs does not depend on what they say.

All ways to do one thing run in one process, in turns, with the same weights and the same prompts, and medians are
compared. No way has a speed before it was compared with float64 on a smaller case of the same shapes.

- **mplus** reads a fresh prompt through `model(input_ids, memory=memory)`, retrieval included, with one attention
  backend. Without more in its name it scores long-term rows as the paper does (`sigmoid_mean`); `mean_dot` is the
  default of the library; `no_retrieval` has as many rows in front of the text, all of them short-term.
- **floor**: the layers written out over a buffer of ready keys and values, with the fastest of PyTorch's public ways to
  attend, found by trying. Nothing is retrieved. This is what the decoder itself takes over a prefix so long.
- **hf_prefix**: the decoder of transformers with a cache that begins with the same prefix. Nothing is retrieved.
- **published**: the steps of the published code in plain PyTorch. It keeps hidden states, and joins, normalises,
  projects and rotates all of them for every prompt, in every layer. On a GPU its long-term rows are on the host.
"""
NOTHING = "Nothing has been recorded yet."


def load(folder: Path = RECORDS) -> dict[str, dict[str, Any]]:
    """Every record of ``mplus bench`` in a folder, by the name of its file without ``bench-``, in order of the page."""
    found = {
        path.stem.removeprefix("bench-"): json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("bench-*.json"))
    }
    order = list(HEADINGS)
    return dict(sorted(found.items(), key=lambda item: (order.index(item[1]["kind"]), item[0])))


def render(records: Mapping[str, Mapping[str, Any]]) -> str:
    """The page."""
    parts = [PREAMBLE.strip()]
    if not records:
        parts.append(NOTHING)
    said = None
    for name, record in records.items():
        if record["kind"] != said:
            said = record["kind"]
            parts.append(f"## {HEADINGS[said]}")
        parts += _section(name, record)
    return "\n\n".join(parts) + "\n"


def _section(name: str, record: Mapping[str, Any]) -> list[str]:
    parts = [f"### {name}", opening(record)]
    if record["kind"] == "read":
        parts.append(f"![Times of all ways to read]({FIGURES.name}/{figure_name(name)})")
    parts += [_markdown(sheet) for sheet in sheets(record)]
    missing = refused(record)
    if missing:
        parts.append("\n".join(["Without a speed:", "", *(f"- {line}" for line in missing)]))
    parts.append(f"Every number: `benchmarks/speed/records/bench-{name}.json`.")
    return parts


def _markdown(sheet: Sheet) -> str:
    lines = [f"**{sheet.title}**", "", f"| {' | '.join(sheet.head)} |"]
    lines.append("| --- |" + " ---: |" * (len(sheet.head) - 1))
    lines += [f"| {' | '.join(row)} |" for row in sheet.rows]
    if sheet.notes:
        lines += ["", *(f"- {note}" for note in sheet.notes)]
    return "\n".join(lines)


def figure_name(name: str) -> str:
    """File of the figure of a record."""
    return f"speed-{name}.svg"


LINE, LEFT, WIDTH = 18, 190, 430


def figure(record: Mapping[str, Any]) -> str:
    """Bars of the medians of a record of reads, with its first number of threads."""
    threads, section = next(iter(record["by_threads"].items()))
    parts, y = [], LINE
    for length, facts in section["by_length"].items():
        times = {name: entry["p50_ms"] for name, entry in facts["arms"].items() if entry["status"] == "ok"}
        parts.append(_text(0, y, f"{length} tokens, {threads} thread{'' if threads == '1' else 's'}", "bold"))
        y += LINE
        for name, taken in times.items():
            width = max(1.0, WIDTH * taken / max(times.values()))
            colour = "#0072b2" if name.startswith("mplus") else "#999999"
            parts.append(f'<rect x="{LEFT}" y="{y - 11}" width="{width:.1f}" height="13" fill="{colour}"/>')
            parts += [_text(0, y, name), _text(LEFT + width + 6, y, f"{taken:,.1f} ms")]
            y += LINE
        y += LINE // 2
    size = f'width="{LEFT + WIDTH + 100}" height="{y}"'
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">\n'
        f'<rect width="100%" height="100%" fill="#ffffff"/>\n{body}\n</svg>\n'
    )


def _text(x: float, y: float, text: str, weight: str = "normal") -> str:
    return f'<text x="{x:.1f}" y="{y}" font-weight="{weight}">{html.escape(text)}</text>'


def main() -> None:
    """Write all of it."""
    records = load()
    PAGE.write_text(render(records), encoding="utf-8")
    for name, record in records.items():
        if record["kind"] == "read":
            (FIGURES / figure_name(name)).write_text(figure(record), encoding="utf-8")


if __name__ == "__main__":
    main()
