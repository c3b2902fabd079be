"""``mplus bench decode``: single tokens behind a prompt, with a cache that grows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mplus.bench.correctness import backend_names
from mplus.bench.fixture import PUBLISHED_SCORE, BenchmarkFixture
from mplus.bench.presets import Preset
from mplus.bench.readers import BASELINES, Comparison, Reader, mplus_variants, verify
from mplus.bench.record import MachineRates, Record, Section, make_record, with_headline
from mplus.timing import Arm, in_rounds, ratio

STEPS = 64
"""Tokens behind one prompt."""


def measure(
    preset: Preset, device: torch.device, threads: Sequence[int], repeats: int, backends: Sequence[str] | None = None
) -> Record:
    """Return the record of ``mplus bench decode``: mplus with every backend, transformers, and the bare layers."""
    memory = [one for name in backend_names(backends) for one in mplus_variants(name) if one.score == PUBLISHED_SCORE]
    variants = [*memory, *(one for one in BASELINES if one.name != "published")]
    results = verify(variants, preset, device)
    fixture = BenchmarkFixture(preset, device, keep=False)

    def section(rates: MachineRates) -> Section:
        return time_steps(Comparison.of(fixture, variants, results, preset.prompt + STEPS), repeats, rates)

    record = make_record("decode", preset, device, threads, section, results, repeats=repeats, steps=STEPS)
    return with_headline(record)


@torch.no_grad()
def time_steps(comparison: Comparison, repeats: int, rates: MachineRates) -> Section:
    """Time ``STEPS`` steps behind each of ``repeats`` prompts, all variants in turns step by step."""
    fixture, preset = comparison.fixture, comparison.fixture.preset
    prompts = fixture.prompts(preset.prompt, repeats + 1)
    tokens = fixture.prompts(1, STEPS)
    tried = comparison.choose_attention(1, preset.prompt)
    arms = [_arm(name, reader, prompts, tokens) for name, reader in comparison.readers.items()]
    times = in_rounds(arms, repeats * STEPS, fixture.device, warm=STEPS)
    flops, nbytes = work(preset)
    backend = comparison.best_backend(times)
    name = f"mplus/{backend}"
    return {
        "arms": comparison.entries(times, lambda seconds: rates.roofline_share(flops, nbytes, seconds)),
        "floor_attention": tried,
        "gflop": round(flops / 1e9, 4),
        "gbyte": round(nbytes / 1e9, 4),
        "best_backend": backend,
        "ratios": {
            "decode_over_floor": ratio(times, name, "floor"),
            "decode_over_hf_prefix": ratio(times, name, "hf_prefix"),
        },
    }


def _arm(name: str, reader: Reader, prompts: torch.Tensor, tokens: torch.Tensor) -> Arm:
    """Return the arm of a reader, which reads the next prompt, not timed, before every ``STEPS`` steps."""

    def prepare(number: int) -> None:
        if number % STEPS == 0:
            reader.reset()
            reader.read(prompts[number // STEPS])

    return Arm(name, lambda number: reader.step(tokens[number % STEPS]), prepare)


def work(preset: Preset) -> tuple[float, float]:
    """Return floating-point operations and bytes of one step: weights, and keys and values in front, once each."""
    width = preset.heads * preset.head_dim
    narrow = preset.key_heads * preset.head_dim
    linear = preset.hidden_size * (2 * width + 2 * narrow + 3 * preset.intermediate_size)
    rows = preset.prefix_rows + preset.prompt + STEPS // 2
    head = preset.vocab_size * preset.hidden_size
    flops = 2 * (preset.layers * linear + head) + preset.layers * 4 * rows * width
    numbers = preset.layers * (linear + 2 * rows * narrow) + head
    return flops, numbers * preset.torch_dtype.itemsize
