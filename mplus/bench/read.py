"""What it costs to read a prompt with a full memory, against three plain ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mplus.bench import read_scaling as growing
from mplus.bench.comparison import Contest
from mplus.bench.correctness import backend_names
from mplus.bench.decode import STEPS, steps
from mplus.bench.fixtures.presets import Preset
from mplus.bench.fixtures.setup import Bed
from mplus.bench.machine import Machine
from mplus.bench.readers import MEAN_DOT, PLAIN_WAYS, Way, judged, ways_with
from mplus.bench.record import measured
from mplus.timing import Arm, in_rounds, ratio


def measure(
    preset: Preset,
    device: torch.device,
    threads: Sequence[int],
    repeats: int,
    backends: Sequence[str] | None = None,
    lengths: Sequence[int] | None = None,
    growth: bool = False,
) -> dict[str, Any]:
    """The record of ``mplus bench read``.

    Args:
        preset, device, threads, repeats: with what, where, with how many threads and rounds.
        backends: of mplus; None: all but ``reference`` and ``flex``.
        lengths: tokens of the prompts; None: those of the preset. The first one is also that of ``ratios``.
        growth: also read memories into which more and more was written.
    """
    lengths = list(lengths or preset.lengths)
    names = backend_names(backends)
    ways = [*(way for name in names for way in ways_with(name)), *PLAIN_WAYS]
    verdicts = judged(ways, preset, device)
    bed = Bed(preset, device)
    room = max(*lengths, preset.prompt + STEPS)
    made: list[Contest] = []

    def section(machine: Machine) -> dict[str, Any]:
        if not made:
            made.append(Contest.of(bed, ways, verdicts, room))
        (contest,) = made
        found = {str(length): _length(contest, length, repeats) for length in lengths}
        stepping = contest.only(lambda way: way.name != "published" and _plain_name(way))
        return {"by_length": found, "decode": steps(stepping, max(1, repeats // 2), machine)}

    record = measured("read", preset, device, threads, section, verdicts, repeats=repeats, lengths=lengths)
    first = record["by_threads"][str(threads[0])]
    short = first["by_length"][str(lengths[0])]
    found = {
        **record,
        "best_backend": short["best_backend"],
        "ratios": {**short["ratios"], "decode_over_floor": first["decode"]["ratios"]["decode_over_floor"]},
        "by_length": {length: facts["ratios"] for length, facts in first["by_length"].items()},
    }
    made.clear()
    if growth:
        found["growth"] = growing.measure(bed, short["best_backend"], threads[0], repeats)
    return found


def _plain_name(way: Way) -> bool:
    """Whether a way is mplus as published, or none of mplus."""
    return way.backend is None or way.name == f"mplus/{way.backend}"


def _length(contest: Contest, length: int, repeats: int) -> dict[str, Any]:
    """All ways with prompts of one length; in a round all read the same prompt."""
    prompts = contest.bed.prompts(length, repeats + 1)
    tried = contest.choose_floor(length)
    arms = [
        Arm(
            name,
            lambda turn, reader=reader: reader.read(prompts[turn]),  # type: ignore[misc]
            lambda _, reader=reader: reader.before(),  # type: ignore[misc]
        )
        for name, reader in contest.readers.items()
    ]
    times = in_rounds(arms, repeats, contest.bed.device)
    backend = contest.best_backend(times)
    return {
        "arms": contest.entries(times),
        "floor_attention": tried,
        "best_backend": backend,
        "ratios": ratios(times, backend),
    }


def ratios(times: Mapping[str, Sequence[float]], backend: str | None) -> dict[str, float | None]:
    """Medians of the ratios within a round, for mplus with ``backend``."""
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
