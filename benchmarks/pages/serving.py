"""The page ``docs/benchmarks/serving.md``: many users at once, from the records in ``benchmarks/serving/records``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from attrs import define

from benchmarks.pages.markdown import measured_on, table
from benchmarks.records import ROOT, load

PAGE = ROOT / "docs" / "benchmarks" / "serving.md"
FOLDER = ROOT / "benchmarks" / "serving" / "records"
PREAMBLE = """
# Many users at once

What the server and the batch reader were measured to do, beside what was asked of them. This page is made from
`benchmarks/serving/records` by `python -m benchmarks.pages`; each record is written by the program of its name, which
says how it measures. How to start a server: [Many users at once](../many-users.md); what a number of users needs: [Plan
for many users](../plan.md).
"""
ABOUT = ("device", "torch", "commit", "date", "mplus", "modified", "python", "transformers", "peft", "accelerate")
"""Fields of a record that say on what it was measured, and not what."""


@define(frozen=True)
class Measurement:
    """Something that is to be measured.

    Attributes:
        heading: of its section.
        asked: what it is to show.
    """

    heading: str
    asked: str


MEASUREMENTS = {
    "steps": Measurement(
        "The batch reader alone",
        "A step of B rows takes at most 1.2 times a plain forward of B rows with a static cache (B = 1, "
        "8, 32); prefill of 32 prompts together takes at most .25 of each alone.",
    ),
    "load": Measurement(
        "Answers over HTTP",
        "32 users get at least 8 times the tokens per second of one `generate` after another, and at "
        "least 4 times those of `--max-batch 1`; with 8 users the first token comes within .25 s (95 %); "
        "while another user writes a novel, 99 % of the gaps between tokens are at most 100 ms; texts are "
        "those of each alone.",
    ),
    "smollm2": Measurement(
        "SmolLM2 with `kv`",
        "8 users: texts equal to alone, 99 % of the gaps at most 4 decode steps, at least 3 times the "
        "tokens per second of one user.",
    ),
    "writes": Measurement("Writes together", "32 writes of one chunk each take at most 120 ms, synced."),
    "cancel": Measurement("Clients that leave", "The row of a client that has gone is free within .1 s."),
    "lru": Measurement(
        "More users than open memories", "2,000 users with 64 memories open stay inside the budget, with no error."
    ),
    "kill9": Measurement(
        "Killed while it writes", "After 50 SIGKILLs no acknowledged write is lost, and none is doubled."
    ),
    "soak": Measurement(
        "Twenty minutes", "16 users for 20 minutes: resident memory stays within 5 %, file descriptors constant."
    ),
    "ray_owner": Measurement(
        "On Ray Serve",
        "After SIGKILL of the engine that owns a memory it is served again within 1 s; of 200 requests at "
        "once about one memory none is refused.",
    ),
}


def render() -> str:
    """Return the page; it says what has not been measured."""
    names = [*MEASUREMENTS, *sorted({file.stem for file in FOLDER.glob("*.json")} - MEASUREMENTS.keys())]
    return "\n\n".join([PREAMBLE.strip(), *(section(name) for name in names)]) + "\n"


def section(name: str) -> str:
    """Return the section of a record, whether it is there or not."""
    measurement = MEASUREMENTS.get(name, Measurement(f"`{name}`", ""))
    parts = [f"## {measurement.heading}"]
    if measurement.asked:
        parts.append(f"Asked: {measurement.asked}")
    if not (FOLDER / f"{name}.json").exists():
        return "\n\n".join([*parts, f"**Not measured yet**: `benchmarks/serving/records/{name}.json` is missing."])
    record = load("serving", name)
    return "\n\n".join([*parts, *tables(record), measured_on(record, f"serving/{name}")])


def tables(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield a table of what a record measured once, and one for each list of measurements that have the same fields."""
    where = record.get("circumstances", {})
    numbers = {
        name: value for name, value in record.items() if name not in (*ABOUT, "circumstances") and value is not where
    }
    once = [[name, text] for name, text in _flat(numbers)]
    if once:
        yield table(["what", "measured"], once)
    for name, value in numbers.items():
        if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
            fields = [field for field in value[0] if not isinstance(value[0][field], dict | list)]
            rows = [[_shown(one.get(field)) for field in fields] for one in value]
            yield f"**{_words(name)}**\n\n{table([_words(field) for field in fields], rows)}"


def _flat(numbers: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in numbers.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{_words(name)}, ")
        elif not isinstance(value, list):
            yield f"{prefix}{_words(name)}", _shown(value)
        elif value and not any(isinstance(one, dict | list) for one in value) and len(value) <= 8:
            yield f"{prefix}{_words(name)}", ", ".join(map(_shown, value))


def _words(name: str) -> str:
    return name.replace("_", " ")


def _shown(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
