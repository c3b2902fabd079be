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
    held, taken = activations(load("memory", "activations")), times(load("memory", "activation_times"))
    return replace(page, "activations", f"{held}\n\n{taken}\n")


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


def times(record: Mapping[str, Any]) -> str:
    """Tabulate the times of a step, over those of "keep"."""
    decoders = record["decoders"]
    head = ["activations", *(f"{one['layers']} layers" for one in decoders)]
    rows = []
    for ways in zip(*(one["ways"] for one in decoders), strict=True):
        name = f"`{ways[0]['way']}`" + ("" if ways[0]["share"] is None else f", share {ways[0]['share']:g}")
        rows.append(
            [name, *(f"{one['over_keep']:.2f} ({one['quartiles'][0]:.2f}-{one['quartiles'][1]:.2f})" for one in ways)]
        )
    opening = (
        f"The time of one step over that with `keep`, on a CPU: {decoders[0]['tokens']} tokens, a Llama as above, "
        f"median and quartiles of {record['rounds']} rounds in which all take turns, in processor time of one thread. "
        "Here the host is the device: it is what recomputing and copying cost, and says nothing of a GPU."
    )
    return "\n\n".join([opening, table(head, rows), measured_on(record, "memory/activation_times")])
