"""The page ``docs/benchmarks/memory.md`` and its figure: what a large memory takes, keeps and costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.pages.drawing import HEIGHT, LEFT, TOP, WIDTH, curve, picture, rule, text
from benchmarks.pages.markdown import measured_on, table
from benchmarks.records import ROOT, load
from mplus.stores.base import StoreLayout
from mplus.stores.quantized import QuantizedStore
from mplus.stores.ram import RamStore

PAGE = ROOT / "docs" / "benchmarks" / "memory.md"
FIGURE = ROOT / "docs" / "assets" / "million.svg"
MIB = 2**20
LLAMA3_8B = StoreLayout(
    layers=32, hidden_size=4096, key_size=256, dtype=torch.bfloat16, projected_size=2 * 8 * 128, keeps_hidden=False
)
"""Long-term rows of Llama-3.1-8B."""
PREAMBLE = """
# Long-term memory

What a large memory takes and keeps. This page is made from records by `python -m benchmarks.pages`. See also [How it
works](../how-it-works.md) and [Durability](../durability.md); how few rows are found among many: [Retrieval from an
index](retrieval.md); what changing a store costs: [Speed](speed.md#appending-evicting-merging).
"""


def render() -> str:
    """Return the page."""
    sections = [
        million(load("memory", "million")),
        quantized(load("quality", "quantized")),
        mapped(load("speed", "mapped_files")),
        keys_and_values(load("speed", "kv_writing"), load("quality", "kv_context")),
        loading(load("memory", "import_memory")),
    ]
    return "\n\n".join([PREAMBLE.strip(), *sections]) + "\n"


def figures() -> dict[Path, str]:
    """Return the curves of the million tokens."""
    return {FIGURE: figure(load("memory", "million"))}


def million(record: Mapping[str, Any]) -> str:
    """Tabulate what is answered and retrieved while a million tokens are written to disk."""
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
            "![Accuracy and gold recall over the tokens written](../assets/million.svg)",
            table(head, rows),
            f"{closing}{measured_on(record, 'memory/million')}",
        ]
    )


def quantized(record: Mapping[str, Any]) -> str:
    """Compare answers from rows in int8 and fp8 with those in bfloat16."""
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
    ending = f"{closing}{measured_on(record, 'quality/quantized')}"
    return "\n\n".join(["## Quantised rows", opening, table(head, rows), ending])


def mapped(record: Mapping[str, Any]) -> str:
    """Tabulate opening a memory in files and reading rows from it."""
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
    ending = measured_on(record, "speed/mapped_files")
    return "\n\n".join(["## A memory in files", opening_text, table(head, rows), ending])


def keys_and_values(writing: Mapping[str, Any], context: Mapping[str, Any]) -> str:
    """Tabulate what a memory of keys and values costs and takes, and what its chunks should be written behind."""
    rows = []
    for name in ("notes", "novel"):
        found, room = writing[name], writing[name]["room"]
        ratios = [f"{found[clock]['ratio_of_sums']:.2f}" for clock in ("wall", "cpu")]
        sizes = [f"{room[form]['in_ram']:.2f}" for form in ("bfloat16", "int8")]
        mean = round(found["tokens"] / found["texts"])
        rows.append([name, f"{found['texts']} of {mean}", *ratios, f"{room['tokens']:,}", *sizes])
    cache = writing["notes"]["room"]["cache_bytes_per_token_bfloat16"]
    opening = (
        "SmolLM2-135M-Instruct in float32 writes notes, and passages of a novel, to a memory `kv` in a directory, each "
        "text by a `write` of its own. Speed is that of the bare decoder reading the same chunks, logits included, in "
        "turns with it: 1 is as fast. By the clock on the wall every write waits for the disk, beside what else ran "
        f"(load average {writing['load_average']:.0f} on 2 cores); by that of the CPU it does not. Bytes per token, "
        f"begin, table and reserved room included, are shares of the {cache:,} of the decoder's own cache in bfloat16."
    )
    head = ["", "texts, tokens each", "speed, wall", "speed, CPU", "tokens", "bytes, bfloat16", "bytes, int8"]
    told = [
        [
            f"{cell['context_chunks']}",
            f"{cell['chunks']}",
            f"{cell['right']:.2f} ({cell['low']:.2f} to {cell['high']:.2f})",
        ]
        for cell in context["cells"]
    ]
    behind = (
        "What a chunk should be written behind, besides the begin: up to `context_chunks` chunks of its source. "
        f"{context['cells'][0]['questions']} questions about 48 notes of one source, with the right chunk brought back "
        "alone, or next to the question behind three others; share of answers with the right value, and its 95 % "
        "interval. No setting is better than another by more than chance, so that chunks are written behind none: that "
        "costs least, and rows are independent of each other."
    )
    head_behind = ["`context_chunks`", "chunks brought back", "right"]
    return "\n\n".join(
        [
            "## A memory of keys and values",
            opening,
            table(head, rows),
            measured_on(writing, "speed/kv_writing"),
            behind,
            table(head_behind, told, text_columns=0),
            measured_on(context, "quality/kv_context"),
        ]
    )


def loading(record: Mapping[str, Any]) -> str:
    """Tabulate the anonymous memory that loading a published checkpoint takes."""
    rows = []
    for run in record["runs"]:
        sizes = (run["target_bytes"], run["peak_bytes"] - run["before_bytes"], run["largest_tensor_bytes"])
        over = f"{run['over_target_in_largest_tensors']:.2f}"
        rows.append([run["dtype"], *(f"{size / MIB:,.0f}" for size in sizes), over])
    size, stored = record["checkpoint"]["bytes"] / MIB, record["checkpoint"]["dtype"]
    opening = (
        f"A checkpoint in the published layout, {size:,.0f} MiB in {stored}, is loaded in a process of its own. Its "
        "anonymous memory, beyond that before loading, may exceed the decoder and its memory by "
        f"{record['allowed_over_target_in_largest_tensors']} times the largest tensor."
    )
    head = ["loaded as", "decoder and memory, MiB", "peak, MiB", "largest tensor, MiB", "excess in largest tensors"]
    ending = measured_on(record, "memory/import_memory")
    return "\n\n".join(["## Loading a published checkpoint", opening, table(head, rows), ending])


def figure(record: Mapping[str, Any]) -> str:
    """Draw accuracy, and gold recall of the worst layer, over the tokens written (logarithmic)."""
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
    parts.append(text(LEFT + 12, TOP + HEIGHT - 40, "blue: accuracy; grey: gold recall of the worst layer"))
    return picture(parts, f"tokens written behind {record['facts']} facts", room=40)
