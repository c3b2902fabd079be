"""Puts what a run on a GPU found into the tree: its records, and the order of backends that ``auto`` takes there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu.choice import chosen_order
from benchmarks.gpu.packages import ROOT
from benchmarks.gpu.summary import Lines, is_rehearsal, of_kind
from benchmarks.records import write

RECORDS = ROOT / "benchmarks" / "gpu" / "records"
MEASURED = ROOT / "mplus" / "backends" / "measured.json"


def put_into_tree(lines: Lines, records: Path = RECORDS, measured: Path = MEASURED) -> list[Path]:
    """Write the records of a run and what ``auto`` takes on its device; return the files. A rehearsal writes none."""
    if is_rehearsal(lines):
        return []
    (device, *_) = of_kind(lines, "device")
    facts = {key: value for key, value in device.items() if key not in {"kind", "part"}}
    written = []
    for name, line in {line["name"]: line for line in of_kind(lines, "record")}.items():
        file = records / f"{name}.json"
        write(file, with_commit(line["record"], facts))
        written.append(file)
    gates = [{key: value for key, value in line.items() if key != "kind"} for line in of_kind(lines, "gate")]
    parts = [{key: value for key, value in line.items() if key != "kind"} for line in of_kind(lines, "part")]
    write(records / "gates.json", {**facts, "parts": parts, "gates": gates})
    written.append(records / "gates.json")
    order = chosen_order(lines)
    if order is not None:
        known = json.loads(measured.read_text(encoding="utf-8")) if measured.exists() else {}
        known[device["capability"]] = order
        write(measured, known)
        written.append(measured)
    return written


def with_commit(record: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record with the commit of the run, where it ran in a copy of the tree without git."""
    where = dict(record.get("circumstances", {}))
    if where.get("commit") is None:
        where |= {name: facts.get(name) for name in ("commit", "modified")}
    return {**record, "circumstances": where}
