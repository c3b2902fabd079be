"""The summary of a run: what it ran on, which gates did not open and why, and the ratios that were measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Lines = Sequence[Mapping[str, Any]]


def of_kind(lines: Lines, kind: str) -> list[Mapping[str, Any]]:
    """Return the lines of one kind."""
    return [line for line in lines if line["kind"] == kind]


def is_rehearsal(lines: Lines) -> bool:
    """Return whether nothing of a run was on a GPU; also where that is not known."""
    devices = of_kind(lines, "device")
    return not devices or bool(devices[0]["rehearsal"])


def summary(lines: Lines) -> str:
    """Return the summary as Markdown."""
    device: Mapping[str, Any] = next(iter(of_kind(lines, "device")), {})
    told = [heading(lines, device), *parts(lines), *refused(lines), *measured(lines)]
    return "\n".join(told) + "\n"


def heading(lines: Lines, device: Mapping[str, Any]) -> str:
    """Return the first lines: a rehearsal says that it is one."""
    if is_rehearsal(lines):
        return "# A rehearsal on a CPU\n\n**Nothing here was run on a GPU.** Times and speeds mean nothing.\n"
    versions = ", ".join(f"{name} {device.get(name)}" for name in ("torch", "cuda", "transformers", "python"))
    gib = device.get("total_bytes", 0) / 2**30
    facts = f"Compute capability {device['capability']}, {gib:.0f} GiB, {versions}, commit {device.get('commit')}."
    return f"# {device['device']}\n\n{facts}\n"


def parts(lines: Lines) -> Iterable[str]:
    """Yield a table of the parts."""
    yield "| part | gates | failed | skipped | ended |\n| --- | ---: | ---: | ---: | --- |"
    for part in of_kind(lines, "part"):
        gates = [line for line in of_kind(lines, "gate") if line["part"] == part["part"]]
        counts = [sum(line["status"] == status for line in gates) for status in ("failed", "skipped")]
        ended = part["status"] if part["reason"] is None else f"{part['status']}: {_one_line(part['reason'])}"
        yield f"| {part['part']} | {len(gates)} | {counts[0]} | {counts[1]} | {ended} |"


def refused(lines: Lines) -> Iterable[str]:
    """Yield the gates that failed, and those that could not be tried."""
    for status, title in (("failed", "Failed"), ("skipped", "Could not be tried")):
        found = [line for line in of_kind(lines, "gate") if line["status"] == status]
        if found:
            yield f"\n## {title}\n"
            yield from (f"- {line['gate']}: {_one_line(line['reason'] or '')}" for line in found)


def measured(lines: Lines) -> Iterable[str]:
    """Yield the ratios of every record; the last one of a name counts."""
    records = {line["name"]: line for line in of_kind(lines, "record")}
    if records:
        yield "\n## Measured\n"
    for name, line in records.items():
        ratios = {key: value for key, value in line.get("ratios", {}).items() if value is not None}
        yield f"- {name}: " + (", ".join(f"{key} {value}" for key, value in ratios.items()) or "see the record")


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300].replace("|", "/")
