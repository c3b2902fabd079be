"""What every record of a measurement has."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch

from mplus.bench import machine
from mplus.bench.correctness import FAILED, OK, Verdict
from mplus.bench.fixtures.presets import Preset
from mplus.bench.machine import Machine
from mplus.environment import run_info
from mplus.timing import summary

Section = Callable[[Machine], dict[str, Any]]


def measured(
    kind: str,
    preset: Preset,
    device: torch.device,
    threads: Sequence[int],
    section: Section,
    verdicts: Mapping[str, Verdict],
    **settings: Any,
) -> dict[str, Any]:
    """Run ``section`` once for every number of threads, each time after the machine itself, and put all together.

    Args:
        kind: what is measured.
        preset, device: with what, and where.
        threads: of torch on the CPU.
        section: measures; gets the rates of the machine.
        verdicts: of the gate, by arm.
        settings: further facts.
    """
    before = torch.get_num_threads()
    by_threads = {}
    try:
        for count in threads:
            torch.set_num_threads(count)
            begun = _load()
            rates = machine.measure(device, preset.torch_dtype, quick=preset.name == "tiny")
            found = section(rates)
            by_threads[str(count)] = {"machine": {**rates.plain(), "load_average": [begun, _load()]}, **found}
    finally:
        torch.set_num_threads(before)
    where: dict[str, Any] = {"threads": list(threads)}
    if device.type == "cuda":
        where["device"] = torch.cuda.get_device_name(device)
    return {
        "kind": kind,
        "preset": attrs.asdict(preset, value_serializer=_plain),
        "prefix_rows": preset.prefix_rows,
        "settings": settings,
        "circumstances": run_info(**where),
        "gate": {name: verdict.plain() for name, verdict in verdicts.items()},
        "by_threads": by_threads,
    }


def with_first(record: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """The record with these facts of its first section, which are those that are quoted, beside it."""
    first = next(iter(record["by_threads"].values()))
    return {**record, **{name: first[name] for name in names}}


def _load() -> float | None:
    """Processes that wanted to run in the last minute, these included; more than there are cores disturb a timing."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):  # not on every system
        return None


def _plain(instance: Any, attribute: Any, value: Any) -> Any:
    """As JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value


def arm_entry(verdict: Verdict, seconds: Sequence[float] | None, **facts: Any) -> dict[str, Any]:
    """What a record says of one arm: quantiles, or why there are none."""
    if verdict.status != OK or not seconds:
        return {"status": verdict.status, "reason": verdict.reason}
    return {"status": OK, **summary(seconds), **facts}


def failed(record: Mapping[str, Any]) -> dict[str, str]:
    """Arms that compute something else than they should, and how that showed."""
    return {name: facts["reason"] for name, facts in record["gate"].items() if facts["status"] == FAILED}
