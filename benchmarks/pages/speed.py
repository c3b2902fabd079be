"""The page ``docs/benchmarks/speed.md`` and its figures, from the records in ``benchmarks/speed/records``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from benchmarks.pages.drawing import bars
from benchmarks.pages.markdown import measured_on, table
from benchmarks.records import ROOT, load
from mplus.bench.record import Record
from mplus.bench.tables import Table, opening, refused, tables

PAGE = ROOT / "docs" / "benchmarks" / "speed.md"
FIGURES = ROOT / "docs" / "assets"
FOLDER = ROOT / "benchmarks" / "speed" / "records"
SHOWN = {
    "read-cpu": "Reading a prompt",
    "read-growth-cpu": "Reading while memory grows",
    "decode-cpu": "Single tokens",
    "write-cpu": "Writing",
    "score-cpu": "Scoring long-term rows",
    "attention-cpu": "Attention alone",
    "store-cpu": "Appending, evicting, merging",
}
"""The newest record of every measurement, and its heading; other records of ``mplus bench`` are named at the end."""
PREAMBLE = """
# Speed

This page is made from `benchmarks/speed/records` by `python -m benchmarks.pages`. The records come from [`mplus
bench`](../cli.md#mplus-bench-read), which measures the same on your machine. Decoders have random weights and memories
random rows: what a read costs does not depend on what they say.

All variants run in one process, in turns, with the same weights and prompts; medians are compared. Before it is timed,
each is compared with float64 on a smaller case of the same shapes. The tables have the first number of threads that
was measured, the records every one.

- **mplus** reads a fresh prompt through `model(input_ids, memory=memory)`, retrieval included, with one attention
  backend. By default the name stands for the paper's score of long-term rows (`sigmoid_mean`); `mean_dot` is the
  default of the library; `no_retrieval` has as many rows in front of the text, all of them short-term.
- **floor**: the layers written out over a buffer of ready keys and values, with the fastest of PyTorch's public
  attention functions. Nothing is retrieved. This is what the decoder itself takes over a prefix so long.
- **hf_prefix**: the decoder of transformers with a cache that begins with the same prefix. Nothing is retrieved.
- **published**: the steps of the published code in plain PyTorch. It keeps hidden states, and joins, normalises,
  projects and rotates all of them for every prompt, in every layer. On a GPU its long-term rows are on the host.
"""


def render() -> str:
    """Return the page."""
    parts = [PREAMBLE.strip()]
    for name, heading in SHOWN.items():
        parts += [f"## {heading}", *section(name, cast("Record", load("speed", f"bench-{name}")))]
    parts += ["## Wrapping and writing", overhead(load("speed", "overhead"))]
    parts += ["## Training many memories at once", training(load("speed", "batched_training"))]
    others = sorted({path.stem for path in FOLDER.glob("bench-*.json")} - {f"bench-{name}" for name in SHOWN})
    lines = [f"- `{name}.json`: {opening(cast('Record', load('speed', name)))}" for name in others]
    return "\n\n".join([*parts, "## Further records", "\n".join(lines)]) + "\n"


def section(name: str, record: Record) -> list[str]:
    """Return the paragraphs on one record: its first number of threads, or only its growth where it has that."""
    threads, first = next(iter(record["by_threads"].items()))
    found = tables({**record, "by_threads": {threads: first}})
    if record.get("growth"):
        found = found[-1:]
    parts = [opening(record)]
    if figure_path(name) in figures():
        parts.append(f"![Times of all variants](../{FIGURES.name}/{figure_path(name).name})")
    said: set[str] = set()
    parts += [_markdown(one, said) for one in found]
    skipped = [f"`{variant}`" for variant, facts in record["gate"].items() if facts["status"] == "skipped"]
    wrong = [line for line in refused(record) if ": failed: " in line]
    ending = f"Every number: `benchmarks/speed/records/bench-{name}.json`."
    if skipped:
        ending = f"Not measured here, for the reasons in the record: {', '.join(skipped)}. {ending}"
    return [*parts, *(["\n".join(f"- {line}" for line in wrong)] if wrong else []), ending]


def _markdown(found: Table, said: set[str]) -> str:
    """Return a table without what could not be measured, and without the notes in ``said``, which then has all."""
    rows = [row for row in found.rows if "skipped" not in row]
    notes = [note for note in found.notes if note not in said]
    said.update(notes)
    lines = [f"**{found.title}**", "", table(found.head, rows)]
    return "\n".join([*lines, *(["", *(f"- {note}" for note in notes)] if notes else [])])


def figures() -> dict[Path, str]:
    """Return the bars of all records of reads that are shown with their times."""
    reads = {name: load("speed", f"bench-{name}") for name in SHOWN if name.startswith("read-")}
    return {figure_path(name): figure(record) for name, record in reads.items() if not record.get("growth")}


def figure_path(name: str) -> Path:
    """Return the file of a record's figure."""
    return FIGURES / f"speed-{name}.svg"


def figure(record: Mapping[str, Any]) -> str:
    """Draw the medians of a record of reads, with its first number of threads."""
    threads, first = next(iter(record["by_threads"].items()))
    groups = []
    for length, facts in first["by_length"].items():
        times = {name: entry["p50_ms"] for name, entry in facts["arms"].items() if entry["status"] == "ok"}
        drawn = [(name, taken, "#0072b2" if name.startswith("mplus") else "#999999") for name, taken in times.items()]
        groups.append((f"{length} tokens, {threads} thread{'' if threads == '1' else 's'}", drawn))
    return bars(groups, "ms")


def overhead(record: Mapping[str, Any]) -> str:
    """Describe what a wrapped decoder costs without a memory, and a write beside the forward it contains."""
    alone, write = record["wrapped_without_memory"], record["write"]
    return (
        f"A Llama of {record['parameters'] / 1e6:.0f} M parameters, medians of {alone['pairs']} ratios within a pair. "
        f"Wrapped, with `memory=None`, against the same decoder unwrapped, 128 tokens: {alone['ratio']:.2f} (quartiles "
        f"{_both(alone['ratio_quartiles'])}). Writing a chunk of 512 tokens as 256 rows, with their retriever keys, "
        f"against the decoder's forward over 768 tokens: {write['ratio']:.2f} ({_both(write['ratio_quartiles'])}). An "
        f"empty memory takes {record['bytes_beyond_rows']:,} bytes. {measured_on(record, 'speed/overhead')}"
    )


def _both(quartiles: tuple[float, float]) -> str:
    return " and ".join(f"{value:.2f}" for value in quartiles)


def training(record: Mapping[str, Any]) -> str:
    """Tabulate many streams per training step against one."""
    rows, threads = [], f"{record['circumstances']['threads']} threads"
    for name, facts in record.items():
        if isinstance(facts, dict) and "ratio" in facts:
            pairs = (facts[f"{what}_per_second"] for what in ("samples", "tokens"))
            rows.append([name, f"{facts['ratio']}", *(f"{both['batch']:,} and {both['one']:,}" for both in pairs)])
    return (
        f"{record['streams']} streams per step against one, same objective, chunks and number of steps, in turns.\n\n"
        + table(["decoder", "ratio", "samples/s, batch and one", "tokens/s, batch and one"], rows)
        + f"\n\n{measured_on(record, 'speed/batched_training', threads)}"
    )
