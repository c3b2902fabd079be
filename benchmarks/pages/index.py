"""The page ``docs/benchmarks/index.md``: a picture and the few newest numbers of every subject."""

from __future__ import annotations

from typing import Any

from benchmarks.pages.markdown import measured_on, table
from benchmarks.pages.quality import accuracies, pooled
from benchmarks.records import ROOT, load
from mplus.evaluation.reports.report import Report
from mplus.evaluation.reports.worth import HEAD, worth_rows

PAGE = ROOT / "docs" / "benchmarks" / "index.md"
MIB = 2**20
PREAMBLE = """
# Benchmarks

What was measured, in a few numbers each; the tables are behind the links. Everything comes from a CPU with two cores,
from records in `benchmarks/` that name commit, versions and machine, by `python -m benchmarks.pages`. `mplus bench`
measures speed on [your machine](../cli.md#mplus-bench-read), `mplus eval` what [your memory](../evaluation.md) retains.
"""


def render() -> str:
    """Return the page."""
    return f"{PREAMBLE.strip()}\n\n{chat()}\n\n{quality()}\n\n{speed()}\n\n{memory()}\n\n{retrieval()}\n"


def chat() -> str:
    """Summarise what a memory of notes is worth to a chat model."""
    record = load("quality", "chat-notes")
    report = Report.from_plain(record)  # type: ignore[arg-type]  # a report with facts beside it
    options: Any = report.settings["protocol"]
    opening = (
        f"{report.circumstances['model']}, untrained, is told {options['notes']} notes and asked about them, "
        f"{options['episodes']} sets of names kept apart from those that settings were chosen by (the order of the "
        "best chunks alone was compared on both). `ceiling`: the right note alone, as text; "
        "`kv`: the keys and values of what a memory chooses; `kv-text`: the same as text."
    )
    return _section(
        "A chat model with a memory",
        opening,
        table(HEAD, worth_rows(report)),
        measured_on(record),
        "[Every table, and what it shows](chat.md)",
    )


def quality() -> str:
    """Summarise what is retained after 128 chunks."""
    record = load("quality", "recall-tiny")
    report, seeds = pooled(record), record["seeds"]
    names = {
        "mplus": "with long-term memory",
        "memoryllm": "short-term memory only",
        "mplus-random": "random retrieval",
        "window": "a plain window, no memory",
        "bm25": "BM25, the text found put into the prompt",
    }
    rows = []
    for name, meaning in names.items():
        found = [report.arm(name).at(age) for age in (8, 128)]
        shares = ["-" if cell is None else f"{cell.accuracy:.1%}" for cell in found]
        rows.append([f"{meaning} (`{name}`)", *shares, f"{report.arm(name).tokens_attended}"])
    worst = min(accuracies(facts)["mplus"]["128"] for facts in seeds.values())
    opening = (
        f"A decoder of {record['parameters']:,} parameters, trained for it in minutes, is told facts once, a fact in "
        f"each chunk of 16 tokens, and asked later. {len(seeds)} seeds, the worst at {worst:.1%} after 128 chunks; by "
        f"chance {report.chance:.1%}."
    )
    return _section(
        "What is remembered",
        "![Accuracy over the age of a fact, for every system compared](../assets/recall-tiny.svg)",
        opening,
        table(["answered", "8 chunks later", "128 chunks later", "rows and tokens attended"], rows),
        "[All systems, every seed, the retriever, stories](quality.md)",
    )


def speed() -> str:
    """Summarise what a read costs beside other ways to have as many rows in front of a text."""
    record, growth = load("speed", "bench-read-cpu"), load("speed", "bench-read-growth-cpu")["growth"]
    first = next(iter(record["by_threads"].values()))
    short = first["by_length"]["16"]["arms"]
    backend = record["best_backend"]
    names = {
        f"mplus/mean_dot/{backend}": "mplus, default score",
        f"mplus/{backend}": "mplus, score of the paper",
        "hf_prefix": "transformers, a cache that begins with as many tokens; nothing retrieved",
        "floor": "the bare layers over ready keys and values; nothing retrieved",
        "published": "the steps of the published code",
    }
    rows = [[meaning, f"{short[name]['p50_ms']:,.0f}"] for name, meaning in names.items()]
    last = growth[-1]
    size = last["written_tokens"]
    opening = (
        f"Reading a prompt of 16 tokens with {record['prefix_rows']:,} rows in front of it, "
        f"{record['preset']['layers']} layers of width {record['preset']['hidden_size']}, one thread. After {size:,} "
        f"tokens were written, with {last['long_term_rows']:,} long-term rows in every layer, the same read takes "
        f"{last['arms']['read/mean_dot']['p50_ms']:,.0f} ms: every row is scored, a fixed number is attended to."
    )
    return _section(
        "What a read costs",
        "![Median times of reading 16, 64 and 512 tokens in every way](../assets/speed-read-cpu.svg)",
        opening,
        table(["16 tokens", "median, ms"], rows),
        measured_on(record),
        "[Reading, decoding, writing, scoring, training](speed.md)",
    )


def memory() -> str:
    """Summarise a million tokens on disk."""
    record: dict[str, Any] = load("memory", "million")
    last = record["after_tokens"][max(record["after_tokens"], key=int)]
    formats = load("quality", "quantized")["formats"]
    opening = (
        f"A small decoder is told {record['facts']} facts and then reads novels, {record['tokens']:,} tokens in all. "
        f"It then answers {last['accuracy']:.1%} of the questions. The memory has {record['long_term_rows']:,} rows in "
        f"each layer; its files take {record['disk_bytes'] / MIB:.0f} MiB, and while it was written the process grew "
        f"by {record['anonymous_growth_bytes'] / MIB:.0f} MiB. Rows in int8 take about half the bytes and change "
        f"{abs(formats['int8']['difference_points']):.2f} percentage points of the answers."
    )
    return _section(
        "A million tokens on disk",
        "![Accuracy and gold recall over the tokens written](../assets/million.svg)",
        opening,
        measured_on(record),
        "[Memory on disk, quantised rows, loading](memory.md)",
    )


def retrieval() -> str:
    """Summarise retrieval from an index beside scoring every row."""
    record = load("speed", "retrieval-speed")
    rows = []
    for count, facts in record["by_rows"].items():
        found = facts["1 threads"]["by_wanted"]["256"]
        times = (f"{found[name]['p50_ms']:.1f}" for name in ("linear", "faiss_ivf"))
        rows.append([f"{int(count):,}", *times, f"{found['recall']:.1%}"])
    return _section(
        "Retrieval from an index",
        "![Milliseconds of a selection over the number of rows](../assets/retrieval.svg)",
        "Picking 256 rows of a layer for one text, one thread: `linear` scores every row, `faiss_ivf` those in a few "
        "cells of an index.",
        table(["rows", "`linear`, ms", "`faiss_ivf`, ms", "of the exact best rows"], rows),
        measured_on(record),
        "[Time, recall, and what it costs in answers](retrieval.md)",
    )


def _section(heading: str, *parts: str) -> str:
    return "\n\n".join([f"## {heading}", *parts])
