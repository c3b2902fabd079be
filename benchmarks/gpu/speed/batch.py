"""The batch reader at 1, 32 and 256 users, each with a memory of their own: how long joining and a step take."""

from __future__ import annotations

from typing import Any

import torch
from attrs import evolve

from benchmarks.gpu.session import Session
from benchmarks.gpu.speed.benches import fitting
from mplus import BatchReader
from mplus.bench.fixture import BenchmarkFixture
from mplus.bench.presets import SPARE, Preset, free_bytes
from mplus.environment import run_info
from mplus.timing import median, synchronise, timed

USERS = (1, 32, 256)
STEPS = 30
SHORT_TERM, RETRIEVED, LONG_TERM = 768, 256, 4_096
"""Rows of a memory of which 256 fit beside a large decoder: its keys and values are copied for each user."""


def batch(session: Session) -> None:
    """Let more and more users join one reader, and time its steps."""
    preset = fitting(session)
    preset = preset if session.tiny else with_small_memory(preset)
    users, steps = ((1, 4), 2) if session.tiny else (USERS, STEPS)
    fixture = BenchmarkFixture(preset, session.device, keep=False)
    model: Any = fixture.wrapped("auto")
    model.eval()
    reader, cases = BatchReader(model), []
    prompts = fixture.prompts(preset.prompt, max(users))[:, 0]
    for count in users:
        free = free_bytes(session.device)
        if free is not None and (count - len(reader.rows)) * row_bytes(preset) * SPARE > free:
            session.write("note", reason=f"{count} users do not fit into {free / 2**30:.0f} GiB")
            break
        cases.append(timed_case(fixture, model, reader, prompts[:count], steps))
        write(session, preset, cases, reader)


def with_small_memory(preset: Preset) -> Preset:
    """Return the preset with a memory of which many fit."""
    return evolve(preset, short_term_tokens=SHORT_TERM, retrieved_tokens=RETRIEVED, long_term_rows=LONG_TERM)


def timed_case(
    fixture: BenchmarkFixture, model: Any, reader: BatchReader, prompts: torch.Tensor, steps: int
) -> dict[str, Any]:
    """Let users join until there is one for each prompt ``[n, T]``; return milliseconds of joining and of a step."""
    device, new = fixture.device, prompts[len(reader.rows) :]
    requests = [(fixture.memory(model), prompt) for prompt in new]
    synchronise(device)
    joined = timed(lambda: check(reader.join(requests, max_new_tokens=2 * steps)), device)
    tokens = torch.randint(fixture.preset.vocab_size, (len(prompts),), generator=torch.Generator().manual_seed(1))
    tokens = tokens.to(device)
    reader.step(tokens)
    taken = [timed(lambda: reader.step(tokens), device) for _ in range(steps)]
    step = 1000 * median(taken)
    return {
        "users": len(prompts),
        "tokens_per_s": round(1000 * len(prompts) / step, 1),
        "ms": {"step": round(step, 4), "joining, each user": round(1000 * joined / len(new), 4)},
    }


def check(rows: list[Any]) -> None:
    """Raise the error of a row that could not join."""
    for row in rows:
        if row.error is not None:
            raise row.error


def row_bytes(preset: Preset) -> int:
    """Return the bytes of the keys and values of one user."""
    numbers = 2 * preset.layers * preset.key_heads * preset.head_dim * (preset.prefix_rows + preset.prompt + 2 * STEPS)
    return numbers * preset.torch_dtype.itemsize


def write(session: Session, preset: Preset, cases: list[dict[str, Any]], reader: BatchReader) -> None:
    """Write the record of the cases so far, beside how many times as many tokens come as for one user."""
    first = cases[0]["tokens_per_s"]
    ratios = {f"{case['users']} users, tokens over one": round(case["tokens_per_s"] / first, 2) for case in cases}
    facts = {"preset": preset.name, "prefix_rows": preset.prefix_rows, "buffer_bytes": reader.nbytes}
    record = {"kind": "batch", **facts, "cases": cases, "circumstances": run_info()}
    session.write("record", name=f"batch-{preset.name}", ratios=ratios, record=record)
