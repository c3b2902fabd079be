"""The committed records: where they lie, and how they are read and written.

A program ``benchmarks/KIND/NAME.py`` writes ``benchmarks/KIND/records/NAME.json``, or ``NAME-WHAT.json`` where it
measures several things.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
"""The repository."""


def record_path(kind: str, name: str) -> Path:
    """Return the file of a record; ``kind`` is "speed", "memory" or "quality"."""
    return ROOT / "benchmarks" / kind / "records" / f"{name}.json"


def load(kind: str, name: str) -> dict[str, Any]:
    """Read a committed record. Raises FileNotFoundError."""
    record: dict[str, Any] = json.loads(record_path(kind, name).read_text(encoding="utf-8"))
    return record


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record as JSON, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
