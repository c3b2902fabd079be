"""``mplus bench`` on the device: attention, decode, read and score, of the largest decoder and memory that fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from attrs import evolve

from benchmarks.gpu.session import Session
from mplus.backends.triton.backend import TritonBackend
from mplus.bench import attention as attending
from mplus.bench import decode as decoding
from mplus.bench import read as reading
from mplus.bench import score as scoring
from mplus.bench.presets import PRESETS, SPARE, Preset, check_room, free_bytes
from mplus.bench.record import Record
from mplus.errors import NotSupported

BACKENDS = (TritonBackend.name, "sdpa", "reference")
LONG_TERM = (150_000, 60_000, 20_000, 4_096)
"""Long-term rows, as many as fit."""
REPEATS, FIRST_REPEATS = 7, 3
FIRST_ROWS = 4_096
"""Long-term rows of the first, short measurement, whose record is there should the long one not end in time."""


def attention(session: Session) -> None:
    """Time the attention of one layer, by every backend but flex, which takes its time to compile."""
    measure(session, "attention", lambda preset, repeats: attending.measure(*how(session, preset), repeats, BACKENDS))


def attention_flex(session: Session) -> None:
    """Time the attention of one layer by FlexAttention beside PyTorch's fused attention."""
    names = ("flex", "sdpa")
    measure(session, "attention-flex", lambda preset, repeats: attending.measure(*how(session, preset), repeats, names))


def decode(session: Session) -> None:
    """Time single tokens behind a prompt."""
    measure(session, "decode", lambda preset, repeats: decoding.measure(*how(session, preset), repeats, BACKENDS[:2]))


def read(session: Session) -> None:
    """Time fresh reads of short and long prompts."""

    def of(preset: Preset, repeats: int) -> Record:
        lengths = preset.lengths[:2] if repeats == FIRST_REPEATS else preset.lengths
        return reading.measure(*how(session, preset), repeats, BACKENDS[:2], lengths)

    measure(session, "read", of)


def score(session: Session) -> None:
    """Time the scoring of long-term rows."""
    measure(session, "score", lambda preset, repeats: scoring.measure(*how(session, preset), repeats))


def how(session: Session, preset: Preset) -> tuple[Preset, torch.device, Sequence[int]]:
    """Return what ``measure`` functions take first."""
    return preset, session.device, [torch.get_num_threads()]


def measure(session: Session, kind: str, run: Callable[[Preset, int], Record]) -> None:
    """Write the record of a short measurement, and then that of a long one in its place."""
    preset = fitting(session)
    if not session.tiny:
        first = evolve(preset, long_term_rows=min(FIRST_ROWS, preset.long_term_rows))
        write(session, f"{kind}-{preset.name}", run(first, FIRST_REPEATS))
        free()
    write(session, f"{kind}-{preset.name}", run(preset, min(REPEATS, preset.repeats)))


def write(session: Session, name: str, record: Record) -> None:
    """Write a record, and its ratios beside it for the summary. Raises ValueError where an arm was wrong."""
    session.write("record", name=name, ratios=ratios_of(record), record=record)
    wrong = {arm: facts.get("reason") for arm, facts in record["gate"].items() if facts["status"] == "failed"}
    for arm, reason in wrong.items():
        session.write("gate", gate=f"{name}/{arm}", status="failed", seconds=0.0, reason=reason)
        session.failed.append(arm)


def ratios_of(record: Record) -> dict[str, float | None]:
    """Return the ratios of a record, or those of the cases in its first section."""
    if record.get("ratios"):
        return dict(record["ratios"])
    first = next(iter(record["by_threads"].values()))
    found: dict[str, float | None] = {}
    for case in first.get("cases", ()):
        found |= {f"{case['queries']} queries, {name}": value for name, value in case["ratios"].items()}
    for rows, by_length in first.get("by_rows", {}).items():
        for length, facts in by_length.items():
            found |= {f"{rows} rows, {length} tokens, {name}": value for name, value in facts["ratios"].items()}
    return found


def fitting(session: Session) -> Preset:
    """Return llama3-8b with as many long-term rows as fit, or the decoder for CPUs where it does not fit at all."""
    if session.tiny:
        return PRESETS["tiny"]
    for rows in LONG_TERM:
        preset = evolve(PRESETS["llama3-8b"], long_term_rows=rows)
        try:
            check_room(preset, session.device)
        except NotSupported:
            continue
        if fits_on_host(preset):
            return preset
    return evolve(PRESETS["cpu"], dtype="bfloat16", device="cuda")


def fits_on_host(preset: Preset) -> bool:
    """Return whether the long-term rows that the published read keeps on the host fit there."""
    rows = preset.layers * preset.long_term_rows * (preset.hidden_size + preset.retriever_width)
    room = free_bytes(torch.device("cpu"))
    return room is None or rows * preset.torch_dtype.itemsize * SPARE < room


def free() -> None:
    """Give the memory of what was measured back, for what comes next."""
    import gc

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
