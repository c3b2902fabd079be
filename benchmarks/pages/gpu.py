"""The page ``docs/benchmarks/gpu.md``: what ``python -m benchmarks.gpu`` found on a GPU, or that it has run on none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.pages.markdown import table
from benchmarks.pages.speed import section
from benchmarks.records import ROOT, load

PAGE = ROOT / "docs" / "benchmarks" / "gpu.md"
FOLDER = ROOT / "benchmarks" / "gpu" / "records"
GATES = "gates"
"""The record of a run's gates; the others are measurements."""
BENCHED = ("attention", "decode", "read", "score")
PREAMBLE = """
# On a GPU

`make gpu`, or `python -m benchmarks.gpu`, tries everything of mplus that is made for a GPU against plain references,
measures it, and lets `auto` take the fastest attention backend that passed; [Kernels](../kernels.md#if-you-have-a-gpu)
says how. This page is made from the records of such a run by `python -m benchmarks.pages`.
"""
NONE = """
**Nothing of mplus was run on a GPU: there is no record of a run.** The gates are rehearsed on a CPU, with interpreted
kernels and the smallest sizes. That says that the program runs, and nothing about a GPU: neither that results there are
right nor how fast they come.
"""


def recorded() -> bool:
    """Return whether there is a record of a run on a GPU."""
    return (FOLDER / f"{GATES}.json").exists()


def render() -> str:
    """Return the page."""
    if not recorded():
        return f"{PREAMBLE.strip()}\n\n{NONE.strip()}\n"
    record = load("gpu", GATES)
    names = sorted(path.stem for path in FOLDER.glob("*.json") if path.stem != GATES)
    measured = [part for name in names for part in measurement(name, load("gpu", name))]
    return "\n\n".join([PREAMBLE.strip(), where(record), *gates(record), *measured]) + "\n"


def where(record: Mapping[str, Any]) -> str:
    """Say what the run ran on."""
    versions = ", ".join(f"{name} {record[name]}" for name in ("torch", "cuda", "transformers"))
    return (
        f"{record['device']}, compute capability {record['capability']}, {versions}, commit {record['commit']}, "
        f"{record['date']}. Every gate: `benchmarks/gpu/records/{GATES}.json`."
    )


def gates(record: Mapping[str, Any]) -> list[str]:
    """Tabulate the parts, and list the gates that failed, those that could not be tried, and parts that were cut."""
    rows = []
    for part in record["parts"]:
        own = [gate for gate in record["gates"] if gate["part"] == part["part"]]
        if own:
            counts = [f"{sum(gate['status'] == status for gate in own)}" for status in ("ok", "failed", "skipped")]
            rows.append([f"`{part['part']}`", *counts])
    found = ["## Gates", table(["gates", "passed", "failed", "not tried"], rows)]
    for status, title in (("failed", "Failed"), ("skipped", "Not tried")):
        found += listed(title, [gate for gate in record["gates"] if gate["status"] == status], "gate")
    cut = [one for one in record["parts"] if one["status"] != "ok" and "gates failed" not in (one["reason"] or "")]
    return [*found, *listed("Parts that did not come to their end", cut, "part")]


def listed(title: str, found: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    """Return a heading and a list with reasons; nothing where there are none."""
    lines = [f"- `{one[name]}`: {' '.join((one['reason'] or '').split())[:200]}" for one in found]
    return [f"**{title}**", "\n".join(lines)] if lines else []


def measurement(name: str, record: Mapping[str, Any]) -> list[str]:
    """Return the section of one measurement."""
    heading, ending = f"## `{name}`", f"Every number: `benchmarks/gpu/records/{name}.json`."
    if record.get("kind") in BENCHED:
        parts = section(name, record)  # type: ignore[arg-type]
        return [heading, *parts[:-1], ending]
    rows = []
    for case in record["cases"]:
        what = ", ".join(f"{key} {value}" for key, value in case.items() if not isinstance(value, Mapping))
        rows += [[what, arm, f"{taken:.3f}"] for arm, taken in case["ms"].items()]
    return [heading, table(["case", "", "median, ms"], rows), ending]
