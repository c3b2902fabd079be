"""Records of measurements: what all kinds have in common, and the rates of the machine that stand in each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NotRequired, Required, TypedDict

import attrs
import torch
from attrs import define

from mplus.bench.baselines import AttentionChoice
from mplus.bench.correctness import FAILED, OK, CheckFacts, CheckResult
from mplus.bench.presets import Preset
from mplus.config import JsonValue
from mplus.environment import load_average, run_info
from mplus.timing import Summary, median, summary, timed


class RateFacts(TypedDict):
    """Rates of the machine as records have them, and its load before and after."""

    copy_gb_per_s: float
    fresh_gb_per_s: float
    matmul_gflop_per_s: float
    matmul_dtype: str
    load_average: NotRequired[list[float | None]]


class Entry(TypedDict, total=False):
    """One variant in a record: quantiles of its times, or why there are none."""

    status: Required[str]
    reason: str | None
    p20_ms: float
    p50_ms: float
    p80_ms: float
    runs: int
    share_of_roofline: float | None
    tokens_per_s: float
    rows_per_s: float


Ratios = Mapping[str, float | None]
"""Medians of ratios within a round."""


class Section(TypedDict, total=False):
    """Everything measured with one number of threads; each kind of record has some of these facts.

    Attributes:
        arms: by name of the variant.
        floor_attention: of the bare layers; by name where there are several.
        best_backend: of mplus.
        decode, by_length, by_rows, cases: sections of a section.
        queries, memory_rows, text_keys, gflop, gbyte, best_of_torch: of a case of attention.
    """

    machine: RateFacts
    arms: Mapping[str, Entry]
    ratios: Ratios
    floor_attention: AttentionChoice | Mapping[str, AttentionChoice]
    best_backend: str | None
    gflop: float
    gbyte: float
    decode: Section
    by_length: Mapping[str, Section]
    by_rows: Mapping[str, Mapping[str, Section]]
    cases: Sequence[Section]
    queries: int
    memory_rows: int
    text_keys: int
    best_of_torch: str


class GrowthPoint(TypedDict, total=False):
    """A read after more and more was written."""

    written_tokens: Required[int]
    short_term_rows: Required[int]
    long_term_rows: Required[int]
    status: str
    reason: str
    prefix_rows: int
    arms: Mapping[str, Summary]
    difference_of_medians_ms: Mapping[str, float]


class Record(TypedDict, total=False):
    """One measurement.

    Attributes:
        kind: the name of its command.
        preset, settings, circumstances: of what, how and where.
        prefix_rows: P.
        gate: checks by variant.
        by_threads: a section for each number of threads.
        best_backend, ratios, by_length, growth: what is quoted, of some kinds.
    """

    kind: Required[str]
    preset: Required[Mapping[str, JsonValue]]
    prefix_rows: Required[int]
    settings: Required[Mapping[str, JsonValue]]
    circumstances: Required[Mapping[str, JsonValue]]
    gate: Required[Mapping[str, CheckFacts]]
    by_threads: Required[Mapping[str, Section]]
    best_backend: str | None
    ratios: Ratios
    by_length: Mapping[str, Ratios]
    growth: list[GrowthPoint]


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

    def to_dict(self) -> RateFacts:
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
    measure: Callable[[MachineRates], Section],
    results: Mapping[str, CheckResult],
    **settings: JsonValue,
) -> Record:
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
    by_threads: dict[str, Section] = {}
    try:
        for count in threads:
            torch.set_num_threads(count)
            load = load_average()
            rates = measure_rates(device, preset.torch_dtype, quick=preset.name == "tiny")
            section = measure(rates)
            machine: RateFacts = {**rates.to_dict(), "load_average": [load, load_average()]}
            by_threads[str(count)] = {"machine": machine, **section}
    finally:
        torch.set_num_threads(before)
    where: dict[str, JsonValue] = {"threads": list(threads)}
    if device.type == "cuda":
        where["device"] = torch.cuda.get_device_name(device)
    return {
        "kind": kind,
        "preset": {
            name: list(value) if isinstance(value, tuple) else value  # as JSON gives it back
            for name, value in attrs.asdict(preset).items()
        },
        "prefix_rows": preset.prefix_rows,
        "settings": settings,
        "circumstances": run_info(**where),
        "gate": {name: result.to_dict() for name, result in results.items()},
        "by_threads": by_threads,
    }


def with_headline(record: Record) -> Record:
    """Return the record with the best backend and the ratios of its first section, which are quoted, beside it."""
    first = next(iter(record["by_threads"].values()))
    return {**record, "best_backend": first["best_backend"], "ratios": first["ratios"]}


def arm_entry(result: CheckResult, seconds: Sequence[float] | None) -> Entry:
    """Return a record's entry for one variant: quantiles of its times, or why there are none."""
    if result.status != OK or not seconds:
        return {"status": result.status, "reason": result.reason}
    quantiles = summary(seconds)
    return {
        "status": OK,
        "p20_ms": quantiles["p20_ms"],
        "p50_ms": quantiles["p50_ms"],
        "p80_ms": quantiles["p80_ms"],
        "runs": quantiles["runs"],
    }


def failed(record: Record) -> dict[str, str]:
    """Return the variants that compute something else than they should, and how that showed."""
    return {name: facts["reason"] for name, facts in record["gate"].items() if facts["status"] == FAILED}
