"""The attention of one layer alone: every backend, and PyTorch's own ways with memory and text joined beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mplus.backends.base import AttentionRequest
from mplus.backends.choose import choose
from mplus.backends.reference import ReferenceBackend
from mplus.bench.baselines.variants import VARIANTS
from mplus.bench.correctness import OK, Verdict, backend_names, check_backend, check_variant, request_of
from mplus.bench.fixtures.presets import Preset
from mplus.bench.machine import Machine
from mplus.bench.record import arm_entry, measured
from mplus.timing import Arm, in_rounds, median, ratio


def measure(
    preset: Preset, device: torch.device, threads: Sequence[int], repeats: int, backends: Sequence[str] | None = None
) -> dict[str, Any]:
    """The record of ``mplus bench attention``."""
    # Alone, the reference says how much the others gain.
    names = [*backend_names(None), ReferenceBackend.name] if backends is None else backend_names(backends)
    verdicts = {f"backend/{name}": check_backend(name, preset, device) for name in names}
    verdicts.update({f"torch/{name}": check_variant(name, preset, device) for name in VARIANTS})

    def section(machine: Machine) -> dict[str, Any]:
        return {"cases": [_case(preset, device, case, verdicts, repeats, machine) for case in cases(preset)]}

    return measured("attention", preset, device, threads, section, verdicts, repeats=repeats)


def cases(preset: Preset) -> list[tuple[int, int, int]]:
    """Queries, memory rows and text keys: a step behind a prompt, prompts over all of memory, and a write."""
    rows = preset.prefix_rows
    step = (1, rows, preset.prompt + 1)
    write = (preset.chunk_tokens, 1 + preset.memory_tokens_per_chunk, preset.chunk_tokens)
    return [step, *((length, rows, length) for length in preset.lengths), write]


@torch.no_grad()
def _case(
    preset: Preset,
    device: torch.device,
    case: tuple[int, int, int],
    verdicts: Mapping[str, Verdict],
    repeats: int,
    machine: Machine,
) -> dict[str, Any]:
    request = request_of(preset, device, case, 0)
    (memory,) = request.segments
    keys, values = torch.cat([memory.keys, request.keys], 2), torch.cat([memory.values, request.values], 2)
    arms, refused = [], {}
    for name, verdict in verdicts.items():
        if verdict.status != OK:
            continue
        kind, _, own = name.partition("/")
        run = _of_backend(own, request) if kind == "backend" else _of_torch(own, request.queries, keys, values)
        try:
            run(0)
        except (RuntimeError, ValueError) as error:  # of memory, say: other cases may still do
            refused[name] = f"{type(error).__name__}: {error}"
        else:
            arms.append(Arm(name, run))
    times = in_rounds(arms, repeats, device)
    flops, nbytes = work(preset, case)
    entries = {}
    for name, verdict in verdicts.items():
        if name in refused:
            entries[name] = {"status": "skipped", "reason": refused[name]}
            continue
        taken = times.get(name)
        share = machine.share(flops, nbytes, median(taken)) if taken else None
        entries[name] = arm_entry(verdict, taken, share_of_roofline=share)
    public = [name for name in times if name.startswith("torch/")]
    best = min(public, key=lambda name: median(times[name]), default="none")
    ratios = {f"{name}_over_torch": ratio(times, name, best) for name in times if name.startswith("backend/")}
    facts = dict(zip(("queries", "memory_rows", "text_keys"), case, strict=True))
    work_done = {"gflop": round(flops / 1e9, 4), "gbyte": round(nbytes / 1e9, 4)}
    return {**facts, **work_done, "arms": entries, "best_of_torch": best, "ratios": ratios}


def _of_backend(name: str, request: AttentionRequest) -> Any:
    backend = choose(name, request)
    return lambda _: backend.attend(request)


def _of_torch(name: str, queries: Tensor, keys: Tensor, values: Tensor) -> Any:
    return lambda _: VARIANTS[name](queries, keys, values)


def work(preset: Preset, case: tuple[int, int, int]) -> tuple[float, float]:
    """Operations and bytes: causal text counts half, keys and values are read once, queries in and outputs out."""
    length, rows, text = case
    pairs = length * (rows + text - length) + length * (length + 1) / 2
    flops = 4 * pairs * preset.heads * preset.head_dim
    numbers = 2 * (rows + text) * preset.key_heads + 2 * length * preset.heads
    return flops, numbers * preset.head_dim * preset.torch_dtype.itemsize
