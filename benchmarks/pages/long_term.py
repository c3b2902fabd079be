"""Write ``docs/long-term.md`` and its figure from records.

python -m benchmarks.pages.long_term
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import records
from benchmarks.pages.drawing import HEIGHT, LEFT, TOP, WIDTH, curve, picture, rule, text
from benchmarks.records import ROOT
from mplus.stores.base import StoreLayout
from mplus.stores.quantized import QuantizedStore
from mplus.stores.ram import RamStore

RECORDS = {
    "million": ("memory", "million"),
    "quantized": ("quality", "quantized"),
    "append": ("speed", "bench-store-cpu"),
    "mapped": ("speed", "mapped_files"),
}
PAGE = ROOT / "docs" / "long-term.md"
FIGURE = ROOT / "docs" / "assets" / "million.svg"
MIB = 2**20
LLAMA3_8B = StoreLayout(
    layers=32, hidden_size=4096, key_size=256, dtype=torch.bfloat16, projected_size=2 * 8 * 128, keeps_hidden=False
)
"""Long-term rows of Llama-3.1-8B."""


def load() -> dict[str, dict[str, Any]]:
    """The records, by short name."""
    return {short: records.load(*name) for short, name in RECORDS.items()}


def render(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The page."""
    opening = (
        "# Long-term memory\n\nWhat stores cost and keep, measured; this page is made from records by "
        "`python -m benchmarks.pages.long_term`. See also [How it works](how-it-works.md) and "
        "[Durability](durability.md); how few rows are found among many: [Retrieval from an index](retrieval.md)."
    )
    sections = {"million": million, "quantized": quantized, "append": append, "mapped": mapped}
    made = [section(found[name]) for name, section in sections.items()]
    return "\n\n".join([opening, *made]) + "\n"


def million(record: Mapping[str, Any]) -> str:
    """A million tokens on disk."""
    rows = []
    for count, found in record["after_tokens"].items():
        recall = " / ".join("-" if share is None else f"{share:.3f}" for share in found["gold_recall_by_layer"])
        rows.append([f"{int(count):,}", f"{found['accuracy']:.3f}", recall, f"{found['seconds']:.2f}"])
    facts = record["facts"]
    names = ("disk", "anonymous_budget", "anonymous_growth", "anonymous_with_model")
    disk, budget, growth, whole = (record[f"{name}_bytes"] / MIB for name in names)
    opening = (
        f"recall-tiny is told {facts} facts in its first thousand tokens and then reads novels, {record['tokens']:,} "
        f"tokens in all. Nothing is evicted: {record['long_term_rows']:,} rows in each of {record['layers']} layers. "
        "All facts are asked for again and again; gold recall is the share of a fact's long-term rows that came back."
    )
    closing = (
        f"Store `{record['store']}`, of whose rows at most {record['bytes_in_memory'] / MIB:.0f} MiB were not in a "
        f"file yet. The files take {disk:.0f} MiB. The budget for anonymous memory was an eighth of that, "
        f"{budget:.0f} MiB; after the first {facts} questions it grew by {growth:.0f} MiB at most, looked at after "
        f"every 4,096 tokens, {'inside' if growth <= budget else 'above'} the budget, to {whole:.0f} MiB with Python, "
        f"PyTorch and the decoder. Mapped from files, libraries included, were "
        f"{record['file_mapped_peak_bytes'] / MIB:.0f} MiB. "
        f"Writing took {record['writing_seconds']:,.0f} s on {record['threads']} thread. "
    )
    head = ["tokens written", "accuracy", "gold recall, layer 0 / 1", f"seconds for {facts} questions"]
    return "\n\n".join(
        [
            "## A million tokens on disk",
            opening,
            "![Accuracy and gold recall over the tokens written](assets/million.svg)",
            table(head, rows),
            closing + where(record, "python -m benchmarks.memory.million"),
        ]
    )


def quantized(record: Mapping[str, Any]) -> str:
    """Rows in int8 and fp8."""
    rows = [
        [
            name,
            f"{found['questions']:,}",
            f"{found['accuracy_bfloat16']:.4f}",
            f"{found['accuracy']:.4f}",
            f"{found['difference_points']:+.2f}",
            f"{found['lost']} / {found['won']}",
            f"{found['retrieved_rows_in_common']:.3f}",
            f"{found['logit_error_over_std']:.4f}",
        ]
        for name, found in record["formats"].items()
    ]
    head = ["rows in", "questions", "bfloat16", "quantised", "points", "lost / won", "rows in common", "logit error"]
    opening = (
        f"recall-tiny in bfloat16, {record['memories']} memories of {record['facts_each']} facts, each written into "
        "`ram` and into `quantized` with the same draws; every fact is asked for once. A read retrieves "
        f"{record['retrieved_tokens']} row per layer instead of the {record['trained_with']} it was trained with, so "
        "that there is something to lose. Rows in common: of those retrieved; logit error: root mean square over the "
        "standard deviation."
    )
    small, plain = (store(LLAMA3_8B).bytes_per_row for store in (QuantizedStore, RamStore))
    closing = (
        f"In the shape of Llama-3.1-8B (8 key heads of 128, retriever keys of 256) a row takes {small:,} bytes in "
        f"either format, with scales, key, birth, source and id: {small / plain:.3f} of the {plain:,} it takes in "
        "bfloat16. "
    )
    ending = closing + where(record, "python -m benchmarks.quality.quantized")
    return "\n\n".join(["## Quantised rows", opening, table(head, rows), ending])


def append(record: Mapping[str, Any]) -> str:
    """What changing a store costs while it grows."""
    rows, settings = [], record["settings"]
    for threads, section in record["by_threads"].items():
        for name, found in section["arms"].items():
            what, count = name.split("/")
            times = [f"{found[key]:.3f}" for key in ("p20_ms", "p50_ms", "p80_ms")]
            rows.append([threads, what, f"{int(count):,}", *times])
    first = next(iter(record["by_threads"].values()))
    ratios = ", ".join(f"{name.split('_')[0]} {ratio:.2f}" for name, ratio in first["ratios"].items())
    load = " to ".join(f"{value:g}" for value in first["machine"]["load_average"])
    opening = (
        f"{settings['rows_per_chunk']} rows of {settings['row_bytes']:,} bytes in one layer of store "
        f"`{settings['store']}`: appended; as many of the oldest births evicted by `fifo`; and both, in a merge of the "
        'mechanism "mplus".'
    )
    closing = (
        f"At 1,000,000 rows over 10,000, medians of ratios within a round: {ratios}. Load average {load}: where that "
        "is above the number of cores, other programs ran too. "
    )
    head = ["threads", "what", "rows of the layer", "p20 ms", "p50 ms", "p80 ms"]
    ending = closing + where(record, "mplus bench store")
    return "\n\n".join(["## Appending, evicting, merging", opening, table(head, rows), ending])


def mapped(record: Mapping[str, Any]) -> str:
    """A memory in files, opened and read."""
    rows = []
    for memory in record["memories"]:
        opening, reading = memory["opening"], memory["reading"]
        times = opening["first_ms"], opening["read_only"]["p50_ms"], opening["writing"]["p50_ms"]
        rows.append(
            [
                f"{memory['layers']}",
                f"{memory['long_term_rows']:,}",
                " / ".join(f"{time:,.0f}" for time in times),
                f"{reading['ram']['p50_ms']:.1f}",
                f"{reading['first']['p50_ms']:.1f} ({reading['first_over_ram']:.1f} times)",
                f"{reading['after']['p50_ms']:.1f} ({reading['after_over_ram']:.1f} times)",
                " to ".join(f"{load:g}" for load in memory["load_average"]),
            ]
        )
    sizes = " and ".join(f"{memory['disk_bytes'] / 2**30:.1f}" for memory in record["memories"])
    first = record["memories"][0]
    opening_text = (
        f"Memories of {sizes} GiB on disk, each with {first['short_term_rows']:,} short-term rows per layer, "
        f"rows of {first['row_bytes']:,} bytes as in Llama-3.1-8B. Opening: the first time, then medians for "
        "reading only and for writing; short-term rows are read and checked then, long-term rows are not. Reading: "
        f"{first['reading']['rows']:,} rows picked at random from one layer, from a warm page cache; "
        "on first touch every block that holds one "
        "is checked."
    )
    head = [
        *("layers", "long-term rows per layer", "opening, ms: first / reading / writing"),
        *("`ram`, ms", "first touch, ms", "afterwards, ms", "load average"),
    ]
    ending = where(record, "python -m benchmarks.speed.mapped_files")
    return "\n\n".join(["## A memory in files", opening_text, table(head, rows), ending])


def where(record: Mapping[str, Any], command: str) -> str:
    """On what it was measured."""
    facts = record["circumstances"]
    return f"{facts['device']}, torch {facts['torch']}, commit {facts['commit']}, by `{command}`."


def table(head: list[str], rows: list[list[str]]) -> str:
    """In Markdown, numbers at the right."""
    lines = [head, ["---:"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def figure(record: Mapping[str, Any]) -> str:
    """Accuracy, and gold recall of the layer that has least, over the tokens written (logarithmic)."""
    found = {int(count): facts for count, facts in record["after_tokens"].items()}
    counts = list(found)

    def place(count: float, share: float) -> tuple[float, float]:
        x = math.log(count / counts[0]) / math.log(counts[-1] / counts[0])
        return LEFT + WIDTH * x, TOP + HEIGHT * (1 - share)

    parts: list[str] = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        parts += rule(place(counts[0], share)[1], f"{share:.0%}")
    for count in (1_000, 10_000, 100_000, 1_000_000):
        if counts[0] <= count <= counts[-1] * 1.01:
            parts.append(text(place(count, 0)[0], TOP + HEIGHT + 18, f"{count:,}", "middle"))
    recall = [(count, min(facts["gold_recall_by_layer"])) for count, facts in found.items()]
    parts += curve([place(*point) for point in recall], "#999999", "")
    answered = [(count, facts["accuracy"]) for count, facts in found.items()]
    parts += curve([place(*point) for point in answered], "#1f77b4", "")
    parts.append(text(LEFT + 12, TOP + HEIGHT - 40, "blue: accuracy; grey: gold recall of the layer with least"))
    return picture(parts, f"tokens written behind {record['facts']} facts", room=40)


def write(page: Path = PAGE, image: Path = FIGURE) -> None:
    """Write all of it."""
    found = load()
    page.write_text(render(found), encoding="utf-8")
    image.write_text(figure(found["million"]), encoding="utf-8")


if __name__ == "__main__":
    write()
