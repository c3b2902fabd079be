"""Where records lie, and writing one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def write(name: str, record: dict[str, Any]) -> Path:
    """Write ``records/name``."""
    path = ROOT / "records" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path
