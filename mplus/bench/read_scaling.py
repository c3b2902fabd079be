"""What a read costs while more and more is written, with short-term memory and the rows retrieved held fixed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from attrs import evolve

from mplus.bench.fixtures.presets import Preset, check_room
from mplus.bench.fixtures.setup import PUBLISHED_SCORE, Bed
from mplus.bench.readers import MEAN_DOT, MemoryReader
from mplus.errors import NotSupported
from mplus.timing import Arm, in_rounds, median, summary

WRITTEN = (10_000, 30_000, 100_000, 300_000, 1_000_000)
"""Text tokens written."""
SCORES = (PUBLISHED_SCORE, MEAN_DOT)


def measure(bed: Bed, backend: str | None, threads: int, repeats: int) -> list[dict[str, Any]]:
    """For each number of tokens written: the read, and scoring and picking alone, with both scores; and the floor."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        written = WRITTEN if bed.preset.name != "tiny" else (128, 512)
        return [_point(bed, tokens, backend or "auto", repeats) for tokens in written]
    finally:
        torch.set_num_threads(before)


def rows_after(preset: Preset, tokens: int) -> tuple[int, int]:
    """Rows in short-term and in long-term memory after so many tokens in full chunks."""
    rows = tokens * preset.memory_tokens_per_chunk // preset.chunk_tokens
    return min(rows, preset.short_term_tokens), max(rows - preset.short_term_tokens, 0)


def _point(whole: Bed, tokens: int, backend: str, repeats: int) -> dict[str, Any]:
    short, long = rows_after(whole.preset, tokens)
    preset = evolve(whole.preset, long_term_rows=long)
    facts: dict[str, Any] = {"written_tokens": tokens, "short_term_rows": short, "long_term_rows": long}
    try:
        check_room(preset, whole.device)
    except NotSupported as error:
        return {**facts, "status": "skipped", "reason": str(error)}
    bed = Bed(preset, whole.device, whole.seed, whole.base, filled=short, keep=False)
    prompts = bed.prompts(preset.prompt, repeats + 1)
    floor = bed.floor(preset.prompt)
    floor.choose(preset.prompt)
    arms = [Arm("floor", lambda turn: floor.read(prompts[turn]))]
    for score in SCORES:
        model = bed.wrapped(backend, score)
        reader = MemoryReader(model, bed.memory(model))
        arms.append(Arm(f"read/{score}", lambda turn, reader=reader: reader.read(prompts[turn])))  # type: ignore[misc]
        if long:
            arms.append(Arm(f"select/{score}", selecting(bed, model)))
    times = in_rounds(arms, repeats, bed.device)
    rest = {
        score: round(1000 * (median(times[f"read/{score}"]) - median(times.get(f"select/{score}", [0.0]))), 4)
        for score in SCORES
    }
    return {
        **facts,
        "status": "ok",
        "prefix_rows": floor.prefix,
        "arms": {name: summary(taken) for name, taken in times.items()},
        "difference_of_medians_ms": rest,
    }


def selecting(bed: Bed, model: Any) -> Callable[[int], Sequence[Any]]:
    """Scoring and picking alone, in all layers, for as many queries as the prompt has tokens."""
    preset, retriever = bed.preset, model.mplus.retriever
    view = bed.content.store.snapshot()
    generator = torch.Generator().manual_seed(bed.seed)
    text = torch.randn(1, preset.prompt, preset.hidden_size, generator=generator).to(bed.device, preset.torch_dtype)
    mask = torch.ones(1, preset.prompt, dtype=torch.bool, device=bed.device)
    with torch.no_grad():
        queries = [retriever.project_queries(layer, text) for layer in range(preset.layers)]

    def run(turn: int) -> Sequence[Any]:
        return [
            retriever.select(layer, query, mask, [view], preset.retrieved_tokens) for layer, query in enumerate(queries)
        ]

    return run
