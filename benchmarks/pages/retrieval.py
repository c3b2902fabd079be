"""The page ``docs/benchmarks/retrieval.md`` and its figure, from the records of both ``retrieval`` programs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.pages.drawing import HEIGHT, LEFT, TOP, WIDTH, curve, picture, rule, text
from benchmarks.pages.markdown import measured_on, table
from benchmarks.records import ROOT, load

PAGE = ROOT / "docs" / "benchmarks" / "retrieval.md"
FIGURE = ROOT / "docs" / "assets" / "retrieval.svg"
PREAMBLE = """
# Retrieval from an index

This page is made by `python -m benchmarks.pages` from the records of `python -m benchmarks.speed.retrieval` and `python
-m benchmarks.quality.retrieval`. What an index costs on a memory of your own: [`mplus eval
retriever`](../evaluation.md#retriever-health).
"""
BUSY = (
    "Above the number of cores, a load average means that other programs ran too: times are longer then, and two "
    "threads can be slower than one."
)
NAMES = ("torch", "faiss_flat", "linear", "faiss_ivf")
COLOURS = {"torch": "#999999", "faiss_flat": "#d55e00", "linear": "#e69f00", "faiss_ivf": "#0072b2"}


def render() -> str:
    """Return the page."""
    sections = [
        speed(load("speed", "retrieval-speed")),
        sweep(load("speed", "retrieval-sweep")),
        retention(load("quality", "retrieval-retention")),
        sigmoid(load("quality", "retrieval-sigmoid")),
    ]
    return "\n\n".join([PREAMBLE.strip(), *sections]) + "\n"


def figures() -> dict[Path, str]:
    """Return the curves of selection times."""
    return {FIGURE: figure(load("speed", "retrieval-speed"))}


def speed(record: Mapping[str, Any]) -> str:
    """Tabulate times and recall by rows, rows wanted and threads."""
    head = ["rows", "threads", "K0", *(f"{name}, ms" for name in NAMES), "times as fast", "recall", "lowest"]
    rows = []
    for count, facts in record["by_rows"].items():
        for threads in (name for name in facts if name.endswith(" threads")):
            for k, found in facts[threads]["by_wanted"].items():
                times = [f"{found[name]['p50_ms']:.2f}" for name in NAMES]
                shares = [f"{found['times_as_fast']:.1f}", f"{found['recall']:.4f}", f"{found['lowest_recall']:.3f}"]
                rows.append([f"{int(count):,}", threads.removesuffix(" threads"), f"{int(k):,}", *times, *shares])
    built = [
        [f"{int(count):,}", f"{facts['cells']:,}", f"{facts['build_s']:.1f}", f"{facts['update']['p50_ms']:.1f}"]
        for count, facts in record["by_rows"].items()
    ]
    loads = [
        load
        for facts in record["by_rows"].values()
        for name, some in facts.items()
        if name.endswith(" threads")
        for load in some["load_average"]
    ]
    keys = record["keys"]
    opening = (
        f"Rows are those that recall-tiny wrote in layer {keys['layer']} for {keys['text_tokens']:,} tokens of text: "
        f"{keys['memories']} memories were told {keys['chunks']:,} chunks each, {keys['distinct_sentences']:,} "
        f"sentences of which no two are alike, about {keys['distinct_facts']:,} facts with different values. Keys are "
        f"{keys['width']} wide and in float32. One text at a time, scored by `mean_dot`: `torch` is a product and "
        "`topk`, `faiss_flat` faiss without an index, `linear` and `faiss_ivf` the retrievers, with everything that a "
        'selection does and their default options. "Times as fast" compares `faiss_ivf` with the faster of the first '
        f"two: median over {record['rounds']} rounds in which all took turns. Recall is the share of the exact best K0 "
        f"rows that came back, mean and lowest over {record['rounds'] + 1} questions."
    )
    return "\n\n".join(
        [
            "## Time and recall",
            opening,
            table(head, rows),
            "![Milliseconds of a selection over the number of rows](../assets/retrieval.svg)",
            "Building an index from keys (training included), and a selection after 256 rows came and 256 left:",
            table(["rows", "cells", "build, s", "selection after a change, ms"], built),
            measured_on(record, "speed/retrieval-speed", f"load average {min(loads):.1f} to {max(loads):.1f}"),
            BUSY,
        ]
    )


def sweep(record: Mapping[str, Any]) -> str:
    """Tabulate recall and time by number of cells, and of cells searched."""
    rows = []
    for cells, facts in record["cells"].items():
        for share, found in facts.items():
            if not share.startswith("1/"):
                continue
            some = [f"{found[k]['ms']:.2f} / {found[k]['recall']:.4f}" for k in found]
            rows.append([f"{int(cells):,}", f"{int(cells) // int(share[2:])}", *some])
    first = next(iter(record["cells"].values()))
    wanted = next(found for share, found in first.items() if share.startswith("1/"))
    trained = ", ".join(
        f"{int(cells):,} cells {facts['train_s']:.0f} s and {facts['add_s']:.0f} s"
        for cells, facts in record["cells"].items()
    )
    opening = (
        f"All {record['keys']['rows']:,} rows, {record['queries']} questions, one thread: milliseconds of a search and "
        f"recall, without ranking. Training and adding all rows took: {trained}."
    )
    return "\n\n".join(
        [
            "## Cells and probes",
            opening,
            table(["cells", "looked into", *(f"K0 = {int(k):,}" for k in wanted)], rows),
            measured_on(record, "speed/retrieval-sweep"),
        ]
    )


def retention(record: Mapping[str, Any]) -> str:
    """Tabulate accuracy over age with other retrievers, for each score that a model was trained with."""
    parts = ["## Accuracy"]
    for score, found in record["by_score"].items():
        arms = [arm for arm in found["report"]["arms"] if arm["status"] == "ok"]
        ages = list(arms[0]["accuracy_by_age"])
        rows = [[arm["name"], *(f"{arm['accuracy_by_age'][age]:.3f}" for age in ages)] for arm in arms]
        options = "; ".join(
            f"`mplus-{name}` with {', '.join(f'{option} = {value}' for option, value in some.items())}"
            for name, some in found["indexes"].items()
        )
        parts += [
            (
                f"recall-tiny trained with `{score}`, read with its own retriever (`mplus`: every row is scored) and "
                "with others that take its parameters, on the same streams and questions: "
                f"{arms[0]['questions_by_age'][ages[0]]} questions at each age in chunks of 16 tokens, and room for "
                f"every row that was written. {options}."
            ),
            table(["arm", *ages], rows),
            (
                f"What each selects at age {ages[-1]} among {found['long_term_rows']:,} rows, {found['wanted']} of "
                "them, by layer; the time is that of one text."
            ),
            _shortcuts(found["shortcuts"]),
            measured_on(found, "quality/retrieval-retention"),
        ]
    return "\n\n".join(parts)


def _shortcuts(found: Mapping[str, Any]) -> str:
    """Tabulate what each retriever finds in each layer, and its time."""

    def by_layer(numbers: list[float | None], digits: int) -> str:
        return " / ".join("-" if number is None else f"{number:.{digits}f}" for number in numbers)

    rows = [
        [
            name,
            by_layer(facts["gold_recall_by_layer"], 3),
            by_layer(facts["overlap_with_exact_by_layer"], 3),
            by_layer(facts["select_ms_by_layer"], 2),
        ]
        for name, facts in found.items()
        if "overlap_with_exact_by_layer" in facts
    ]
    return table(["retriever", "gold recall", "of the exact best rows", "ms"], rows)


def sigmoid(record: Mapping[str, Any]) -> str:
    """Tabulate the recall of approximate retrieval for the published score."""
    rows = [
        [
            where,
            *(f"{found[name]['recall']:.2f} ({found[name]['lowest']:.2f})" for name in ("faiss_ivf", "centroid")),
        ]
        for where, found in record["recall"].items()
    ]
    opening = (
        f"`sigmoid_mean` is no inner product, so an index does not follow it. Drawn keys ({record['rows']:,}, "
        f"{record['width']} wide) and texts of {record['tokens']} queries: keys in 250 clusters and a text of 6 or 60 "
        "of them, or nothing in clusters; std is that of the products. Recall of the exact best "
        f"{record['wanted']} rows, mean (lowest) of {record['draws']} draws, default options."
    )
    return "\n\n".join(
        [
            "## The score of the paper",
            opening,
            table(["keys and text", "faiss_ivf", "centroid"], rows),
            measured_on(record, "quality/retrieval-sigmoid"),
        ]
    )


def figure(record: Mapping[str, Any]) -> str:
    """Draw the median time of a selection of 256 rows over the number of rows, one thread; both axes logarithmic."""
    curves = {
        name: [
            (int(count), facts["1 threads"]["by_wanted"]["256"][name]["p50_ms"])
            for count, facts in record["by_rows"].items()
        ]
        for name in NAMES
    }
    counts = [count for count, _ in curves["torch"]]
    times = [taken for points in curves.values() for _, taken in points]
    low, high = math.floor(math.log10(min(times))), math.ceil(math.log10(max(times)))

    def place(count: float, taken: float) -> tuple[float, float]:
        x = math.log(count / counts[0]) / math.log(counts[-1] / counts[0])
        return LEFT + WIDTH * x, TOP + HEIGHT * (high - math.log10(taken)) / (high - low)

    parts: list[str] = []
    for power in range(low, high + 1):
        parts += rule(place(counts[0], 10.0**power)[1], f"{10.0**power:g} ms")
    for count in counts:
        parts.append(text(place(count, 10.0**low)[0], TOP + HEIGHT + 18, f"{count:,}", "middle"))
    for name, points in curves.items():
        parts += curve([place(*point) for point in points], COLOURS[name], name)
    return picture(parts, "rows of a layer; K0 = 256, one thread")
