"""``mplus bench write``: a chunk written to several memories, one by one and in a batch, against the bare forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from attrs import define, evolve
from torch import Tensor

from mplus.bench.baselines import BareLayers, prefix_keys_values
from mplus.bench.correctness import OK, CheckResult, backend_names, check_backend
from mplus.bench.fixture import BenchmarkFixture, in_double
from mplus.bench.presets import Preset
from mplus.bench.record import Entry, MachineRates, Record, Section, arm_entry, make_record, with_headline
from mplus.mechanisms.short_term.state import ShortTermState
from mplus.memory.memory import Memory
from mplus.timing import Arm, in_rounds, median, ratio

PLAIN = ("floor/one_by_one", "floor/batched")


@define(frozen=True, eq=False)
class Writer:
    """mplus with one backend, which writes to as many streams in two ways.

    Attributes:
        single: memories of one stream each.
        batched: one memory of as many streams.
    """

    single: Sequence[Memory]
    batched: Memory

    @classmethod
    def of(cls, fixture: BenchmarkFixture, backend: str) -> Writer:
        """Make full memories, so that every write drops rows from short-term memory and evicts others."""
        model = fixture.wrapped(backend, long_term_tokens=fixture.preset.long_term_rows)
        streams = fixture.preset.streams
        return cls([fixture.memory(model) for _ in range(streams)], fixture.memory(model, streams))

    def write_one_by_one(self, ids: Tensor) -> None:
        """Write ``ids[i]`` ``[n]`` to memory ``i``."""
        for memory, chunk in zip(self.single, ids, strict=True):
            memory.write_chunk(chunk[None])

    def write_batched(self, ids: Tensor) -> None:
        """Write ``ids`` ``[B, n]`` in one pass."""
        self.batched.write_chunk(ids)


def with_less_long_term(preset: Preset) -> Preset:
    """Return the preset with less long-term memory: a write adds to it and reads none of it."""
    return evolve(preset, long_term_rows=min(preset.long_term_rows, 2 * preset.retrieved_tokens))


def measure(
    preset: Preset, device: torch.device, threads: Sequence[int], repeats: int, backends: Sequence[str] | None = None
) -> Record:
    """Return the record of ``mplus bench write``."""
    preset = with_less_long_term(preset)
    chunk, streams = preset.chunk_tokens, preset.streams
    checks = {name: check_write(name, preset, device) for name in backend_names(backends)}
    results = {f"mplus/{how}/{name}": result for name, result in checks.items() for how in ("one_by_one", "batched")}
    results.update({name: CheckResult() for name in PLAIN})
    fixture = BenchmarkFixture(preset, device, keep=False)
    context = fixture.prefix(short_term=preset.memory_tokens_per_chunk)
    bare = {name: fixture.bare_layers(chunk, context, count) for name, count in zip(PLAIN, (1, streams), strict=True)}
    writers = {name: Writer.of(fixture, name) for name, result in checks.items() if result.status == OK}

    def section(rates: MachineRates) -> Section:
        tried = {name: layers.choose_attention(chunk) for name, layers in bare.items()}
        times = in_rounds(_arms(bare, writers, fixture.prompts(chunk, repeats + 1, streams)), repeats, device)
        best = min(writers, key=lambda name: median(times[f"mplus/batched/{name}"]), default=None)
        return {
            "arms": {name: _entry(result, times.get(name), preset) for name, result in results.items()},
            "floor_attention": tried,
            "best_backend": best,
            "ratios": {
                "write_over_floor": ratio(times, f"mplus/one_by_one/{best}", PLAIN[0]),
                "batched_write_over_floor": ratio(times, f"mplus/batched/{best}", PLAIN[1]),
                "one_by_one_over_batched": ratio(times, f"mplus/one_by_one/{best}", f"mplus/batched/{best}"),
            },
        }

    settings = {"repeats": repeats, "streams": streams, "chunk_tokens": chunk}
    record = make_record("write", preset, device, threads, section, results, **settings)
    return with_headline(record)


def _arms(bare: Mapping[str, BareLayers], writers: Mapping[str, Writer], ids: Tensor) -> list[Arm]:
    """Return both ways of writing for the bare forward and for every writer; ``ids`` are ``[rounds, B, n]``."""
    single, batched = bare.values()
    arms = [
        Arm(PLAIN[0], lambda number: [single.read(row[None], head=False) for row in ids[number]]),
        Arm(PLAIN[1], lambda number: batched.read(ids[number], head=False)),
    ]
    for name, writer in writers.items():
        for how, write in (("one_by_one", writer.write_one_by_one), ("batched", writer.write_batched)):
            arms.append(Arm(f"mplus/{how}/{name}", lambda number, write=write: write(ids[number])))  # type: ignore[misc]
    return arms


def _entry(result: CheckResult, taken: Sequence[float] | None, preset: Preset) -> Entry:
    """Return the entry of one variant, with tokens and rows per second of all streams together."""
    entry = arm_entry(result, taken)
    if taken and entry["status"] == OK:
        entry["tokens_per_s"] = round(preset.streams * preset.chunk_tokens / median(taken), 1)
        entry["rows_per_s"] = round(preset.streams * preset.memory_tokens_per_chunk / median(taken), 1)
    return entry


@torch.no_grad()
def check_write(backend: str, preset: Preset, device: torch.device) -> CheckResult:
    """Check the backend alone, then the last layer's new rows against the bare layers in float64, in both ways."""
    result = check_backend(backend, preset, device)
    if result.status != OK:
        return result
    fixture = BenchmarkFixture(with_less_long_term(preset.reduced()), device, seed=2, keep=False)
    preset, k = fixture.preset, fixture.preset.memory_tokens_per_chunk
    ids = fixture.prompts(preset.chunk_tokens, 1, preset.streams)[0]
    context = fixture.prefix(short_term=k)
    plain = fixture.bare_layers(preset.chunk_tokens, context, preset.streams).read(ids, head=False)[:, -k:]
    weights = in_double(fixture.weights)
    keys, values = prefix_keys_values(weights, [rows.double() for rows in context], preset.streams)
    truth = BareLayers(weights, keys, values, preset.chunk_tokens).read(ids, head=False)[:, -k:]

    def batched() -> Tensor:
        writer = Writer.of(fixture, backend)
        writer.write_batched(ids)
        return _newest(writer.batched, k)

    def one_by_one() -> Tensor:
        writer = Writer.of(fixture, backend)
        writer.write_one_by_one(ids)
        return torch.cat([_newest(memory, k) for memory in writer.single])

    for what, run in (("rows written in a batch", batched), ("rows written one by one", one_by_one)):
        result.check(what, run, truth, plain)
    return result


def _newest(memory: Memory, count: int) -> Tensor:
    """Return hidden states ``[B, count, d]`` of the newest rows of the last layer, of every stream."""
    states = cast("Sequence[ShortTermState]", memory.states)
    return torch.stack([state.context(-1, count).need_hidden() for state in states])
