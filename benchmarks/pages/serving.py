"""The page ``docs/benchmarks/serving.md``: many users at once, from the records in ``benchmarks/serving/records``."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from attrs import define

from benchmarks.pages.markdown import measured_on, table
from benchmarks.records import ROOT

PAGE = ROOT / "docs" / "benchmarks" / "serving.md"
FOLDER = ROOT / "benchmarks" / "serving" / "records"
PREAMBLE = """
# Many users at once

What the server and the batch reader were measured to do, beside what was asked of them. This page is made from
`benchmarks/serving/records` by `python -m benchmarks.pages`; each record is written by the program of its name, which
says how it measures. How to start a server: [Many users at once](../many-users.md); what a number of users needs: [Plan
for many users](../plan.md).
"""
ABOUT = {
    "device", "torch", "commit", "date", "mplus", "modified", "python", "transformers", "peft", "accelerate",
    "safetensors", "numpy", "threads", "program",
}  # fmt: skip
"""Fields of a record that say on what it was measured, and not what."""
TIMES = {"first_token": ("p50_ms", "p95_ms"), "gap": ("p50_ms", "p99_ms")}
LONGEST = 16
"""Entries of a list that are shown; longer ones are in the record."""


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
    "steps-stories260k-kv": Measurement(
        "The batch reader with `kv`",
        "Prefill of 32 prompts together takes at most .25 of each alone.",
    ),
    "steps-smollm2": Measurement(
        "The batch reader with SmolLM2 and `kv`", "A step of B rows takes at most 1.2 times a plain forward of B rows."
    ),
    "load-smollm2": Measurement(
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
    "kill9-engine": Measurement(
        "Its engine killed while it writes", "The same where the engine's process alone is killed, and started again."
    ),
    "kill-copies": Measurement(
        "Killed while it copies",
        "SIGKILL of the server, of its engine, and SIGTERM, in imports, forks and exports: nothing half is there, the "
        "same request succeeds afterwards, and every other memory is as it was.",
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
    record = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    shown = load_tables(record) if "rounds" in record and name.startswith("load") else tables(record)
    return "\n\n".join([*parts, *shown, measured_on(record, f"serving/{name}")])


def load_tables(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield what users got, medians over all rounds, and the ratios within a round."""
    rounds = record["rounds"]
    rows = []
    for name in [name for name, value in rounds[0].items() if isinstance(value, dict)]:
        times = [[_over(rounds, name, what, at) for at in ats] for what, ats in TIMES.items()]
        equal, texts = (sum(one[name].get(field, 0) for one in rounds) for field in ("texts_equal_to_alone", "texts"))
        speed = _over(rounds, name, "tokens_per_second")
        rows.append([name, *map(_shown, [speed, *times[0], *times[1]]), f"{equal} of {texts}" if texts else "-"])
    head = ["", "tokens/s", "first token, ms", "95 %", "gap, ms", "99 %", "texts as alone"]
    yield table(head, rows)
    ratios = {name: value for name, value in record.items() if name.startswith("over_")}
    if "generate" in rounds[0]:
        ratios["generate, one after another, tokens/s"] = median(one["generate"] for one in rounds)
    yield (
        f"Medians of {len(rounds)} rounds. "
        + "; ".join(f"{_words(name)}: {_shown(value)}" for name, value in ratios.items())
        + "."
    )


def _over(rounds: Sequence[Mapping[str, Any]], name: str, *fields: str) -> float:
    found = (functools.reduce(lambda value, field: value[field], fields, one[name]) for one in rounds)
    return float(median(found))


def tables(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield a table of what a record measured once, and one for each short list of measurements of the same fields."""
    numbers = {name: value for name, value in record.items() if name not in ABOUT and name != "circumstances"}
    once = [[name, text] for name, text in _flat(numbers)]
    if once:
        yield table(["what", "measured"], once)
    for name, value in numbers.items():
        if isinstance(value, list) and 0 < len(value) <= LONGEST and all(isinstance(one, dict) for one in value):
            fields = [field for field in value[0] if not isinstance(value[0][field], dict | list)]
            rows = [[_shown(one.get(field)) for field in fields] for one in value]
            yield f"**{_words(name)}**\n\n{table([_words(field) for field in fields], rows)}"


def _flat(numbers: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in numbers.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{_words(name)}, ")
        elif not isinstance(value, list):
            yield f"{prefix}{_words(name)}", _shown(value)
        elif not any(isinstance(one, dict | list) for one in value) and len(value) <= LONGEST:
            yield f"{prefix}{_words(name)}", ", ".join(map(_shown, value)) or "none"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _shown(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
