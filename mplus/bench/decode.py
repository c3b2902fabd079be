"""Single tokens behind a prompt, with a cache that grows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mplus.bench.bed import PUBLISHED_SCORE, Bed
from mplus.bench.gate import OK, Verdict, backend_names
from mplus.bench.machine import Machine
from mplus.bench.presets import Preset
from mplus.bench.record import arm_entry, measured
from mplus.bench.timing import Arm, in_rounds, median, ratio
from mplus.bench.ways import PLAIN_WAYS, FloorReader, Reader, Way, judged, ways_with

STEPS = 64
"""Tokens behind one prompt."""


def decode_ways(backends: Sequence[str]) -> list[Way]:
    """mplus with every backend, transformers, and the floor."""
    memory = [way for backend in backends for way in ways_with(backend) if way.score == PUBLISHED_SCORE]
    return [*memory, *(way for way in PLAIN_WAYS if way.name != "published")]


def measure(
    preset: Preset, device: torch.device, threads: Sequence[int], repeats: int, backends: Sequence[str] | None = None
) -> dict[str, Any]:
    """The record of ``mplus bench decode``."""
    ways = decode_ways(backend_names(backends))
    verdicts = judged(ways, preset, device)
    bed = Bed(preset, device)

    def section(machine: Machine) -> dict[str, Any]:
        readers = {way.name: way.make(bed, preset.prompt + STEPS) for way in ways if verdicts[way.name].status == OK}
        return steps(bed, ways, verdicts, readers, repeats, machine)

    record = measured("decode", preset, device, threads, section, verdicts, repeats=repeats, steps=STEPS)
    first = record["by_threads"][str(threads[0])]
    return {**record, "best_backend": first["best_backend"], "ratios": first["ratios"]}


@torch.no_grad()
def steps(
    bed: Bed,
    ways: Sequence[Way],
    verdicts: Mapping[str, Verdict],
    readers: Mapping[str, Reader],
    repeats: int,
    machine: Machine,
) -> dict[str, Any]:
    """Time ``STEPS`` steps behind each of ``repeats`` prompts, all ways in turns step by step."""
    preset = bed.preset
    prompts = bed.prompts(preset.prompt, repeats + 1)
    tokens = bed.prompts(1, STEPS)
    tried: dict[str, Any] = {}
    for reader in readers.values():
        if isinstance(reader, FloorReader):
            tried = reader.floor.choose(1, preset.prompt)
    arms = [Arm(name, *_stepping(reader, prompts, tokens)) for name, reader in readers.items()]
    times = in_rounds(arms, repeats * STEPS, bed.device, warm=STEPS)
    flops, nbytes = work(preset)
    entries = {}
    for way in ways:
        taken = times.get(way.name)
        share = machine.share(flops, nbytes, median(taken)) if taken else None
        entries[way.name] = arm_entry(verdicts[way.name], taken, share_of_roofline=share)
    backend = best_backend(ways, times)
    name = f"mplus/{backend}"
    return {
        "arms": entries,
        "floor_attention": tried,
        "gflop": round(flops / 1e9, 4),
        "gbyte": round(nbytes / 1e9, 4),
        "best_backend": backend,
        "ratios": {
            "decode_over_floor": ratio(times, name, "floor"),
            "decode_over_hf_prefix": ratio(times, name, "hf_prefix"),
        },
    }


def _stepping(reader: Reader, prompts: torch.Tensor, tokens: torch.Tensor) -> tuple[Any, Any]:
    def run(turn: int) -> None:
        reader.step(tokens[turn % STEPS])

    def prepare(turn: int) -> None:
        if turn % STEPS == 0:
            reader.before()
            reader.read(prompts[turn // STEPS])

    return run, prepare


def best_backend(ways: Sequence[Way], times: Mapping[str, Sequence[float]]) -> str | None:
    """The backend whose reads with the published score had the lowest median; None where none was measured."""
    found = [way for way in ways if way.score == PUBLISHED_SCORE and way.backend and times.get(way.name)]
    return min(found, key=lambda way: median(times[way.name])).backend if found else None


def work(preset: Preset) -> tuple[float, float]:
    """Floating-point operations and bytes of one step: every weight once, keys and values of prefix and text once."""
    width = preset.heads * preset.head_dim
    narrow = preset.key_heads * preset.head_dim
    linear = preset.hidden_size * (2 * width + 2 * narrow + 3 * preset.intermediate_size)
    rows = preset.prefix_rows + preset.prompt + STEPS // 2
    head = preset.vocab_size * preset.hidden_size
    flops = 2 * (preset.layers * linear + head) + preset.layers * 4 * rows * width
    numbers = preset.layers * (linear + 2 * rows * narrow) + head
    return flops, numbers * preset.torch_dtype.itemsize
