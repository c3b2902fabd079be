"""``mplus bench read``: a prompt read with a full memory, against three plain implementations of the same read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from attrs import evolve

from mplus.bench.correctness import backend_names
from mplus.bench.decode import STEPS, time_steps
from mplus.bench.fixture import PUBLISHED_SCORE, BenchmarkFixture
from mplus.bench.presets import Preset, check_room
from mplus.bench.readers import BASELINES, MEAN_DOT, Comparison, MemoryReader, mplus_variants, verify
from mplus.bench.record import GrowthPoint, MachineRates, Ratios, Record, Section, make_record
from mplus.errors import NotSupported
from mplus.evaluation.retriever_swap import own_retriever
from mplus.hf.model.model_class import MemoryModel
from mplus.retrievers.base import Selection
from mplus.timing import Arm, in_rounds, median, ratio, summary

WRITTEN = (10_000, 30_000, 100_000, 300_000, 1_000_000)
"""Text tokens written, where a read is timed while memory grows."""
SCORES = (PUBLISHED_SCORE, MEAN_DOT)


def measure(
    preset: Preset,
    device: torch.device,
    threads: Sequence[int],
    repeats: int,
    backends: Sequence[str] | None = None,
    lengths: Sequence[int] | None = None,
    growth: bool = False,
) -> Record:
    """Return the record of ``mplus bench read``.

    Args:
        preset: what is read.
        device: where.
        threads: of torch, one section each.
        repeats: rounds.
        backends: of mplus; None: all but ``reference`` and ``flex``.
        lengths: tokens of the prompts; None: those of the preset. The first one is also that of ``ratios``.
        growth: also read memories into which more and more was written.
    """
    lengths = list(lengths or preset.lengths)
    variants = [*(one for name in backend_names(backends) for one in mplus_variants(name)), *BASELINES]
    results = verify(variants, preset, device)
    fixture = BenchmarkFixture(preset, device)
    room = max(*lengths, preset.prompt + STEPS)
    made: list[Comparison] = []

    def section(rates: MachineRates) -> Section:
        if not made:  # readers are large, so that all numbers of threads share them
            made.append(Comparison.of(fixture, variants, results, room))
        (comparison,) = made
        found = {str(length): _time_length(comparison, length, repeats) for length in lengths}
        stepping = comparison.only(
            lambda one: one.name != "published" and (one.backend is None or one.name == f"mplus/{one.backend}")
        )
        return {"by_length": found, "decode": time_steps(stepping, max(1, repeats // 2), rates)}

    record = make_record("read", preset, device, threads, section, results, repeats=repeats, lengths=lengths)
    first = record["by_threads"][str(threads[0])]
    short = first["by_length"][str(lengths[0])]
    record |= {
        "best_backend": short["best_backend"],
        "ratios": {**short["ratios"], "decode_over_floor": first["decode"]["ratios"]["decode_over_floor"]},
        "by_length": {length: facts["ratios"] for length, facts in first["by_length"].items()},
    }
    made.clear()
    if growth:
        record["growth"] = _measure_growth(fixture, short["best_backend"] or "auto", threads[0], repeats)
    return record


def _time_length(comparison: Comparison, length: int, repeats: int) -> Section:
    """Time all variants with prompts of one length; in a round all read the same prompt."""
    prompts = comparison.fixture.prompts(length, repeats + 1)
    tried = comparison.choose_attention(length)
    arms = [
        Arm(
            name,
            lambda number, reader=reader: reader.read(prompts[number]),  # type: ignore[misc]
            lambda _, reader=reader: reader.reset(),  # type: ignore[misc]
        )
        for name, reader in comparison.readers.items()
    ]
    times = in_rounds(arms, repeats, comparison.fixture.device)
    backend = comparison.best_backend(times)
    return {
        "arms": comparison.entries(times),
        "floor_attention": tried,
        "best_backend": backend,
        "ratios": _ratios(times, backend),
    }


def _ratios(times: Mapping[str, Sequence[float]], backend: str | None) -> Ratios:
    """Return medians of the ratios within a round, for mplus with ``backend``."""
    memory, dot, bare = f"mplus/{backend}", f"mplus/{MEAN_DOT}/{backend}", f"mplus/no_retrieval/{backend}"
    return {
        "published_over_mplus": ratio(times, "published", memory),
        "published_over_mplus_mean_dot": ratio(times, "published", dot),
        "mplus_over_floor": ratio(times, memory, "floor"),
        "mplus_mean_dot_over_floor": ratio(times, dot, "floor"),
        "mplus_over_hf_prefix": ratio(times, memory, "hf_prefix"),
        "mplus_over_floor_without_retrieval": ratio(times, bare, "floor"),
        "hf_prefix_over_floor": ratio(times, "hf_prefix", "floor"),
    }


def _measure_growth(fixture: BenchmarkFixture, backend: str, threads: int, repeats: int) -> list[GrowthPoint]:
    """Time a read after more and more was written; short-term memory and the rows retrieved are held fixed."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        written = WRITTEN if fixture.preset.name != "tiny" else (128, 512)
        return [_time_after(fixture, tokens, backend, repeats) for tokens in written]
    finally:
        torch.set_num_threads(before)


def _time_after(whole: BenchmarkFixture, tokens: int, backend: str, repeats: int) -> GrowthPoint:
    """Time the read and the retriever alone, by both scores, and the bare layers, after ``tokens`` were written."""
    rows = tokens * whole.preset.memory_tokens_per_chunk // whole.preset.chunk_tokens
    short = min(rows, whole.preset.short_term_tokens)
    preset = evolve(whole.preset, long_term_rows=rows - short)
    facts: GrowthPoint = {"written_tokens": tokens, "short_term_rows": short, "long_term_rows": rows - short}
    try:
        check_room(preset, whole.device)
    except NotSupported as error:
        return {**facts, "status": "skipped", "reason": str(error)}
    fixture = BenchmarkFixture(preset, whole.device, whole.seed, whole.base, filled=short, keep=False)
    prompts = fixture.prompts(preset.prompt, repeats + 1)
    bare = fixture.bare_layers(preset.prompt)
    bare.choose_attention(preset.prompt)
    arms = [Arm("floor", lambda number: bare.read(prompts[number]))]
    for score in SCORES:
        model = fixture.wrapped(backend, score)
        reader = MemoryReader(model, fixture.memory(model))
        arms.append(Arm(f"read/{score}", lambda number, reader=reader: reader.read(prompts[number])))  # type: ignore[misc]
        if rows > short:
            arms.append(Arm(f"select/{score}", _selecting(fixture, model)))
    times = in_rounds(arms, repeats, fixture.device)
    rest = {
        score: round(1000 * (median(times[f"read/{score}"]) - median(times.get(f"select/{score}", [0.0]))), 4)
        for score in SCORES
    }
    return {
        **facts,
        "status": "ok",
        "prefix_rows": bare.prefix,
        "arms": {name: summary(taken) for name, taken in times.items()},
        "difference_of_medians_ms": rest,
    }


def _selecting(fixture: BenchmarkFixture, model: MemoryModel) -> Callable[[int], list[list[Selection]]]:
    """Return a function that only retrieves, in all layers, for as many queries as the prompt has tokens."""
    preset, retriever = fixture.preset, own_retriever(model)
    view = fixture.rows.store_for(model.mplus_engine).snapshot()
    generator = torch.Generator().manual_seed(fixture.seed)
    text = torch.randn(1, preset.prompt, preset.hidden_size, generator=generator).to(fixture.device, preset.torch_dtype)
    mask = torch.ones(1, preset.prompt, dtype=torch.bool, device=fixture.device)
    with torch.no_grad():
        queries = [retriever.project_queries(layer, text) for layer in range(preset.layers)]
    k = preset.retrieved_tokens
    return lambda _: [retriever.select(layer, query, mask, [view], k) for layer, query in enumerate(queries)]
