"""``mplus bench attention``: attention of one layer alone, by every backend and by PyTorch's own functions.

Backends get memory and text apart, as in a read; PyTorch's functions get them joined.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mplus.backends.base import AttentionRequest, AttentionResult
from mplus.backends.choose import choose
from mplus.backends.reference import ReferenceBackend
from mplus.bench.attention_variants import VARIANTS
from mplus.bench.correctness import (
    OK,
    CheckResult,
    backend_names,
    check_attention_variant,
    check_backend,
    random_request,
)
from mplus.bench.presets import Preset
from mplus.bench.record import Entry, MachineRates, Record, Section, arm_entry, make_record
from mplus.timing import Arm, in_rounds, median, ratio

Case = tuple[int, int, int]
"""Queries, memory rows and text keys."""


def measure(
    preset: Preset, device: torch.device, threads: Sequence[int], repeats: int, backends: Sequence[str] | None = None
) -> Record:
    """Return the record of ``mplus bench attention``."""
    # The reference takes part unless others are named: here it says how much the others gain.
    names = [*backend_names(None), ReferenceBackend.name] if backends is None else backend_names(backends)
    results = {f"backend/{name}": check_backend(name, preset, device) for name in names}
    results.update({f"torch/{name}": check_attention_variant(name, preset, device) for name in VARIANTS})
    rows = preset.prefix_rows
    step = (1, rows, preset.prompt + 1)
    write = (preset.chunk_tokens, 1 + preset.memory_tokens_per_chunk, preset.chunk_tokens)
    cases = [step, *((length, rows, length) for length in preset.lengths), write]

    def section(rates: MachineRates) -> Section:
        return {"cases": [_time_case(preset, device, case, results, repeats, rates) for case in cases]}

    return make_record("attention", preset, device, threads, section, results, repeats=repeats)


@torch.no_grad()
def _time_case(
    preset: Preset,
    device: torch.device,
    case: Case,
    results: Mapping[str, CheckResult],
    repeats: int,
    rates: MachineRates,
) -> Section:
    """Time everything that is right and can run one case."""
    arms, refused = _arms(random_request(preset, device, case, 0), results)
    times = in_rounds(arms, repeats, device)
    flops, nbytes = work(preset, case)
    entries: dict[str, Entry] = {}
    for name, result in results.items():
        if name in refused:
            entries[name] = {"status": "skipped", "reason": refused[name]}
            continue
        taken = times.get(name)
        share = rates.roofline_share(flops, nbytes, median(taken)) if taken else None
        entries[name] = arm_entry(result, taken)
        if share is not None:
            entries[name]["share_of_roofline"] = share
    queries, rows, keys = case
    best = min(
        (name for name in times if name.startswith("torch/")), key=lambda name: median(times[name]), default="none"
    )
    return {
        "queries": queries,
        "memory_rows": rows,
        "text_keys": keys,
        "gflop": round(flops / 1e9, 4),
        "gbyte": round(nbytes / 1e9, 4),
        "arms": entries,
        "best_of_torch": best,
        "ratios": {f"{name}_over_torch": ratio(times, name, best) for name in times if name.startswith("backend/")},
    }


def _arms(request: AttentionRequest, results: Mapping[str, CheckResult]) -> tuple[list[Arm], dict[str, str]]:
    """Return the backends that can run a request, and why the others cannot."""
    (memory,) = request.segments
    keys, values = torch.cat([memory.keys, request.keys], 2), torch.cat([memory.values, request.values], 2)

    def function(name: str) -> Callable[[int], Tensor | AttentionResult]:
        kind, _, own = name.partition("/")
        if kind == "torch":
            return lambda _: VARIANTS[own](request.queries, keys, values)
        backend = choose(own, request)
        return lambda _: backend.attend(request)

    arms, refused = [], {}
    for name, result in results.items():
        if result.status == OK:
            run = function(name)
            try:
                run(0)
            except (RuntimeError, ValueError) as error:  # of memory, say: other cases may still do
                refused[name] = f"{type(error).__name__}: {error}"
            else:
                arms.append(Arm(name, run))
    return arms, refused


def work(preset: Preset, case: Case) -> tuple[float, float]:
    """Return operations and bytes: causal text counts half, keys and values are read once, queries in, outputs out."""
    length, rows, text = case
    pairs = length * (rows + text - length) + length * (length + 1) / 2
    flops = 4 * pairs * preset.heads * preset.head_dim
    numbers = 2 * (rows + text) * preset.key_heads + 2 * length * preset.heads
    return flops, numbers * preset.head_dim * preset.torch_dtype.itemsize
