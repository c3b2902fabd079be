"""Single tokens behind a prompt, with a cache that grows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mplus.bench.comparison import Contest
from mplus.bench.correctness import backend_names
from mplus.bench.fixtures.presets import Preset
from mplus.bench.fixtures.setup import PUBLISHED_SCORE, Bed
from mplus.bench.machine import Machine
from mplus.bench.readers import PLAIN_WAYS, Reader, Way, judged, ways_with
from mplus.bench.record import measured, with_first
from mplus.timing import Arm, in_rounds, ratio

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
        return steps(Contest.of(bed, ways, verdicts, preset.prompt + STEPS), repeats, machine)

    record = measured("decode", preset, device, threads, section, verdicts, repeats=repeats, steps=STEPS)
    return with_first(record, "best_backend", "ratios")


@torch.no_grad()
def steps(contest: Contest, repeats: int, machine: Machine) -> dict[str, Any]:
    """Time ``STEPS`` steps behind each of ``repeats`` prompts, all ways in turns step by step."""
    bed, preset = contest.bed, contest.bed.preset
    prompts = bed.prompts(preset.prompt, repeats + 1)
    tokens = bed.prompts(1, STEPS)
    tried = contest.choose_floor(1, preset.prompt)
    arms = [Arm(name, *_stepping(reader, prompts, tokens)) for name, reader in contest.readers.items()]
    times = in_rounds(arms, repeats * STEPS, bed.device, warm=STEPS)
    flops, nbytes = work(preset)
    backend = contest.best_backend(times)
    name = f"mplus/{backend}"
    return {
        "arms": contest.entries(times, lambda seconds: machine.share(flops, nbytes, seconds)),
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
