"""What commands share when they print."""

from __future__ import annotations

import json

from mplus.config import JsonValue


def print_json(plain: JsonValue) -> None:
    """Print plain data as JSON on stdout."""
    print(json.dumps(plain, indent=2))


def size(count: float) -> str:
    """Format a number of bytes in the unit that fits: ``1536`` -> ``1.5 KiB``."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def counts(rows: list[int] | tuple[int, ...]) -> str:
    """Format a number per layer in short: ``96`` where all agree, ``90-96`` where not."""
    low, high = min(rows, default=0), max(rows, default=0)
    return f"{low:,}" if low == high else f"{low:,}-{high:,}"
