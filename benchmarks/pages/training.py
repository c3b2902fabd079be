"""The table in ``docs/training.md`` of bytes that training holds for backward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.pages.markdown import measured_on, table
from benchmarks.pages.readme import replace
from benchmarks.records import ROOT, load

PAGE = ROOT / "docs" / "training.md"


def render() -> str:
    """Return the page with the table of the newest record."""
    page = PAGE.read_text(encoding="utf-8")
    return replace(page, "activations", activations(load("memory", "activations")) + "\n")


def activations(record: Mapping[str, Any]) -> str:
    """Tabulate bytes, recomputed tokens and times for both decoders."""
    head = ["activations", "device bytes", "of keep", "host bytes", "tokens recomputed"]
    head += ["time, keep = 1"] if record["rounds"] else []
    parts = []
    for decoder in record["decoders"]:
        kept = decoder["ways"][0]["device_bytes"]
        rows = [
            [
                f"`{one['way']}`" + ("" if one["share"] is None else f", share {one['share']:g}"),
                f"{one['device_bytes']:,}",
                f"{one['device_bytes'] / kept:.3f}",
                f"{one['host_bytes']:,}",
                f"{one['recomputed_tokens']:,}",
                *([f"{one['seconds_over_keep']:.2f}"] if record["rounds"] else []),
            ]
            for one in decoder["ways"]
        ]
        same = "All gradients equal those of `keep` bit for bit."
        if not all(one["equal"] for one in decoder["ways"]):
            same = "Gradients differ from those of `keep`."
        parts += [f"{decoder['name'][0].upper()}{decoder['name'][1:]}. {same}", table(head, rows)]
    return "\n\n".join([*parts, measured_on(record, "memory/activations")])
