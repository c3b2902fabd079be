"""Records of measurements: what all kinds have in common, and the rates of the machine that stand in each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from attrs import define

from mplus.bench.correctness import FAILED, OK, CheckResult
from mplus.bench.presets import Preset
from mplus.environment import load_average, run_info
from mplus.timing import median, summary, timed


@define(frozen=True)
class MachineRates:
    """Measured rates of a device, with the present number of threads.

    Attributes:
        bytes_per_second: read and written by a copy between tensors larger than caches.
        fresh_bytes_per_second: written into memory that was just allocated, as results of operations are.
        flops_per_second: of a product of square matrices.
        dtype: of these matrices.
    """

    bytes_per_second: float
    fresh_bytes_per_second: float
    flops_per_second: float
    dtype: str

    def roofline_share(self, flops: float, nbytes: float, seconds: float) -> float:
        """Return the share of the roofline reached by this work in this time.

        The roofline is the time of the slower of the two: the operations, or reading and writing the bytes.
        """
        least = max(flops / self.flops_per_second, nbytes / self.bytes_per_second)
        return round(least / seconds, 4)

    def to_dict(self) -> dict[str, Any]:
        """Return the rates as records have them."""
        return {
            "copy_gb_per_s": round(self.bytes_per_second / 1e9, 2),
            "fresh_gb_per_s": round(self.fresh_bytes_per_second / 1e9, 2),
            "matmul_gflop_per_s": round(self.flops_per_second / 1e9, 2),
            "matmul_dtype": self.dtype,
        }


@torch.no_grad()
def measure_rates(device: torch.device, dtype: torch.dtype, quick: bool = False) -> MachineRates:
    """Measure the rates of a device; ``quick`` with small tensors, for tests."""
    large = device.type == "cuda"
    size = 2**16 if quick else (2**31 if large else 2**27)
    side = 64 if quick else (8192 if large else 1024)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    copies, written, products = [], [], []
    for repeat in range(8):
        copied = timed(lambda: target.copy_(source), device)
        filled = timed(lambda: torch.ones_like(source), device)
        multiplied = timed(lambda: torch.mm(left, right, out=product), device)
        if repeat:  # the first time loads kernels and maps pages
            copies.append(copied)
            written.append(filled)
            products.append(multiplied)
    return MachineRates(
        bytes_per_second=2 * source.nbytes / median(copies),
        fresh_bytes_per_second=source.nbytes / median(written),
        flops_per_second=2 * side**3 / median(products),
        dtype=str(dtype).removeprefix("torch."),
    )


def make_record(
    kind: str,
    preset: Preset,
    device: torch.device,
    threads: Sequence[int],
    measure: Callable[[MachineRates], Mapping[str, Any]],
    results: Mapping[str, CheckResult],
    **settings: Any,
) -> dict[str, Any]:
    """Measure with every number of threads, each time after the machine itself, and return the record.

    Args:
        kind: of the measurement, the name of its command.
        preset: what is measured.
        device: where.
        threads: of torch on the CPU, a section each. The present number is restored.
        measure: gets the rates of the machine and returns the section.
        results: of the checks, by variant.
        settings: further facts.
    """
    before = torch.get_num_threads()
    by_threads = {}
    try:
        for count in threads:
            torch.set_num_threads(count)
            load = load_average()
            rates = measure_rates(device, preset.torch_dtype, quick=preset.name == "tiny")
            section = measure(rates)
            by_threads[str(count)] = {
                "machine": {**rates.to_dict(), "load_average": [load, load_average()]},
                **section,
            }
    finally:
        torch.set_num_threads(before)
    where: dict[str, Any] = {"threads": list(threads)}
    if device.type == "cuda":
        where["device"] = torch.cuda.get_device_name(device)
    return {
        "kind": kind,
        "preset": attrs.asdict(preset, value_serializer=_as_json),
        "prefix_rows": preset.prefix_rows,
        "settings": settings,
        "circumstances": run_info(**where),
        "gate": {name: result.to_dict() for name, result in results.items()},
        "by_threads": by_threads,
    }


def _as_json(instance: Any, attribute: Any, value: Any) -> Any:
    """Return a value as JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value


def with_headline(record: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Return the record with these facts of its first section, which are those that are quoted, beside it."""
    first = next(iter(record["by_threads"].values()))
    return {**record, **{name: first[name] for name in names}}


def arm_entry(result: CheckResult, seconds: Sequence[float] | None, **facts: Any) -> dict[str, Any]:
    """Return what a record says of one variant: quantiles of its times, or why there are none."""
    if result.status != OK or not seconds:
        return {"status": result.status, "reason": result.reason}
    return {"status": OK, **summary(seconds), **facts}


def failed(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the variants that compute something else than they should, and how that showed."""
    return {name: facts["reason"] for name, facts in record["gate"].items() if facts["status"] == FAILED}
