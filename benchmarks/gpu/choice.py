"""The order in which ``auto`` asks the attention backends on one kind of GPU: those that passed, the fastest first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.gpu.plan import PARTS
from benchmarks.gpu.summary import Lines, of_kind
from mplus.backends.measured import KINDS

CANDIDATES = ("triton", "sdpa", "reference")
"""Backends that ``auto`` may take; flex, which compiles for every new kind of request, runs where it is named."""


def chosen_order(lines: Lines) -> dict[str, Any] | None:
    """Return the entry of ``measured.json`` for the device of a run; None where too little was measured."""
    times = {**forward_times(lines), "gradient": gradient_times(lines)}
    orders = {
        kind: sorted((name for name in times[kind] if passed(lines, name, kind)), key=lambda name: times[kind][name])
        for kind in KINDS
    }
    (device, *_) = of_kind(lines, "device")
    if not all(orders.values()):
        return None
    facts = {name: device.get(name) for name in ("device", "date", "commit", "torch")}
    return {**orders, **facts, "refused": refused_kernels(lines)}


def passed(lines: Lines, backend: str, kind: str) -> bool:
    """Return whether a backend's gates were all tried, and none failed: those of gradients count for training only."""
    begin = "attention-triton" if backend == "triton" else "attention-torch"
    wanted = {part.name for part in PARTS if part.name.startswith(begin)}
    ended = {line["part"]: line["reason"] for line in of_kind(lines, "part") if line["part"] in wanted}
    if ended.keys() != wanted or not all(reason is None or "gates failed" in reason for reason in ended.values()):
        return False
    gates = [line for line in of_kind(lines, "gate") if line["gate"].startswith(f"{backend}/")]
    if kind != "gradient":
        gates = [line for line in gates if not line["gate"].startswith(f"{backend}/gradient/")]
    statuses = {line["status"] for line in gates}
    return "ok" in statuses and "failed" not in statuses


def forward_times(lines: Lines) -> dict[str, dict[str, float]]:
    """Return milliseconds by backend of a token behind a prompt, and of prompts, each case beside the fastest in it."""
    found: dict[str, dict[str, float]] = {"step": {}, "prompt": {}}
    records = [line["record"] for line in of_kind(lines, "record") if line["record"].get("kind") == "attention"]
    for case in first_section(records[-1]).get("cases", ()) if records else ():
        arms = {name: arm["p50_ms"] for name, arm in case["arms"].items() if arm["status"] == "ok"}
        own = {name: arms[f"backend/{name}"] for name in CANDIDATES if f"backend/{name}" in arms}
        kind = "step" if case["queries"] == 1 else "prompt"
        for name, taken in own.items():
            found[kind][name] = found[kind].get(name, 0.0) + taken / min(own.values())
    return found


def gradient_times(lines: Lines) -> dict[str, float]:
    """Return the time of a training step by backend, each case beside the fastest in it."""
    found: dict[str, float] = {}
    records = [line["record"] for line in of_kind(lines, "record") if line["record"].get("kind") == "gradient"]
    for case in records[-1]["cases"] if records else ():
        for name, taken in case["ms"].items():
            found[name] = found.get(name, 0.0) + taken / min(case["ms"].values())
    return found


def refused_kernels(lines: Lines) -> dict[str, str]:
    """Return the kernels, "score" and "gather", that are not to be used on this device, with the reason."""
    found = {}
    for kernel in ("score", "gather"):
        gates = [line for line in of_kind(lines, "gate") if line["gate"].startswith(f"{kernel}/")]
        failed = [line for line in gates if line["status"] == "failed"]
        if failed:
            found[kernel] = f"{failed[0]['gate']}: {failed[0]['reason']}"[:300]
    return found


def first_section(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what was measured with the first number of threads."""
    found: Mapping[str, Any] = next(iter(record["by_threads"].values()))
    return found
