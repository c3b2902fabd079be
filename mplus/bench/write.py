"""What it costs to write a chunk, one memory at a time and many together, against the bare forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from attrs import define, evolve
from torch import Tensor

from mplus.bench.baselines.layers import prefix_keys_values
from mplus.bench.baselines.roofline import Floor
from mplus.bench.correctness import OK, Verdict, backend_names, check_backend
from mplus.bench.fixtures.presets import Preset
from mplus.bench.fixtures.setup import Bed, doubled
from mplus.bench.machine import Machine
from mplus.bench.record import arm_entry, measured, with_first
from mplus.timing import Arm, in_rounds, median, ratio


@define(frozen=True, eq=False)
class Writer:
    """mplus with one backend: ``streams`` memories of one stream each, and one memory of as many streams."""

    apart: Sequence[Any]
    together: Any

    def one_by_one(self, ids: Tensor) -> None:
        """Write ``ids[i]`` to memory i."""
        for memory, chunk in zip(self.apart, ids, strict=True):
            memory.write_chunk(chunk[None])

    def batched(self, ids: Tensor) -> None:
        """Write ``ids`` ``[B, n]`` in one pass."""
        self.together.write_chunk(ids)


def sized(preset: Preset) -> Preset:
    """With less long-term memory: a write adds to it and reads none of it."""
    return evolve(preset, long_term_rows=min(preset.long_term_rows, 2 * preset.retrieved_tokens))


def writer(bed: Bed, backend: str) -> Writer:
    """Full memories, so that every write drops rows from short-term memory and evicts others."""
    model = bed.wrapped(backend, long_term_tokens=bed.preset.long_term_rows)
    streams = bed.preset.streams
    return Writer([bed.memory(model) for _ in range(streams)], bed.memory(model, streams))


def measure(
    preset: Preset, device: torch.device, threads: Sequence[int], repeats: int, backends: Sequence[str] | None = None
) -> dict[str, Any]:
    """The record of ``mplus bench write``."""
    preset = sized(preset)
    names = backend_names(backends)
    verdicts: dict[str, Verdict] = {}
    for name in names:
        verdict = check_write(name, preset, device)
        verdicts.update({f"mplus/one_by_one/{name}": verdict, f"mplus/batched/{name}": verdict})
    bed = Bed(preset, device, keep=False)
    chunk, streams = preset.chunk_tokens, preset.streams
    context = bed.prefix(short_term=preset.memory_tokens_per_chunk)
    floors = [bed.floor(chunk, context, count) for count in (1, streams)]
    writers = {name: writer(bed, name) for name in names if verdicts[f"mplus/batched/{name}"].status == OK}
    plain = ("floor/one_by_one", "floor/batched")
    verdicts.update({name: Verdict() for name in plain})

    def section(machine: Machine) -> dict[str, Any]:
        ids = bed.prompts(chunk, repeats + 1, streams)
        tried = {name: floor.choose(chunk) for name, floor in zip(plain, floors, strict=True)}
        arms = [
            Arm(plain[0], lambda turn: [floors[0].read(row[None], head=False) for row in ids[turn]]),
            Arm(plain[1], lambda turn: floors[1].read(ids[turn], head=False)),
        ]
        for name, made in writers.items():
            arms.append(Arm(f"mplus/one_by_one/{name}", lambda turn, made=made: made.one_by_one(ids[turn])))  # type: ignore[misc]
            arms.append(Arm(f"mplus/batched/{name}", lambda turn, made=made: made.batched(ids[turn])))  # type: ignore[misc]
        times = in_rounds(arms, repeats, device)
        entries = {}
        for name, verdict in verdicts.items():
            taken = times.get(name)
            entries[name] = arm_entry(verdict, taken, **(_rates(preset, median(taken)) if taken else {}))
        best = min(writers, key=lambda name: median(times[f"mplus/batched/{name}"]), default=None)
        return {
            "arms": entries,
            "floor_attention": tried,
            "best_backend": best,
            "ratios": {
                "write_over_floor": ratio(times, f"mplus/one_by_one/{best}", plain[0]),
                "batched_write_over_floor": ratio(times, f"mplus/batched/{best}", plain[1]),
                "one_by_one_over_batched": ratio(times, f"mplus/one_by_one/{best}", f"mplus/batched/{best}"),
            },
        }

    settings = {"repeats": repeats, "streams": streams, "chunk_tokens": chunk}
    return with_first(
        measured("write", preset, device, threads, section, verdicts, **settings), "best_backend", "ratios"
    )


def _rates(preset: Preset, seconds: float) -> dict[str, float]:
    """Of all streams together."""
    tokens, rows = preset.streams * preset.chunk_tokens, preset.streams * preset.memory_tokens_per_chunk
    return {"tokens_per_s": round(tokens / seconds, 1), "rows_per_s": round(rows / seconds, 1)}


@torch.no_grad()
def check_write(backend: str, preset: Preset, device: torch.device) -> Verdict:
    """The backend alone; then the last layer's new rows against the floor in float64, one by one and batched."""
    verdict = check_backend(backend, preset, device)
    if verdict.status != OK:
        return verdict
    bed = Bed(sized(preset.reduced()), device, seed=2, keep=False)
    preset, k = bed.preset, bed.preset.memory_tokens_per_chunk
    ids = bed.prompts(preset.chunk_tokens, 1, preset.streams)[0]
    context = bed.prefix(short_term=k)
    plain = bed.floor(preset.chunk_tokens, context, preset.streams).read(ids, head=False)[:, -k:]
    weights = doubled(bed.weights)
    keys, values = prefix_keys_values(weights, [rows.double() for rows in context], preset.streams)
    truth = Floor(weights, keys, values, preset.chunk_tokens).read(ids, head=False)[:, -k:]

    def batched() -> Tensor:
        made = writer(bed, backend)
        made.batched(ids)
        return torch.stack([state.context(-1, k).need_hidden() for state in made.together.states])

    def one_by_one() -> Tensor:
        made = writer(bed, backend)
        made.one_by_one(ids)
        return torch.stack([memory.states[0].context(-1, k).need_hidden() for memory in made.apart])

    for what, run in (("rows written in a batch", batched), ("rows written one by one", one_by_one)):
        verdict.attempt(what, run, truth, plain)
    return verdict
