"""Interleaved timing: several implementations of one thing take turns, so that what disturbs one disturbs all."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypedDict

import torch
from attrs import define


def _nothing(number: int) -> None:
    pass


@define(frozen=True, eq=False)
class Arm:
    """One of the implementations that are timed.

    Example:
        >>> import torch
        >>> from mplus.timing import Arm, in_rounds, ratio
        >>> numbers = torch.rand(1000)
        >>> arms = [Arm("sort", lambda number: numbers.sort()), Arm("max", lambda number: numbers.max())]
        >>> times = in_rounds(arms, 9, torch.device("cpu"))
        >>> len(times["sort"]), ratio(times, "sort", "max") > 0
        (9, True)

    Attributes:
        name: in tables and records.
        run: is timed; gets the number of the round, so that all arms can take the same input in a round.
        prepare: runs before ``run``, with the same number, and is not timed.
    """

    name: str
    run: Callable[[int], object]
    prepare: Callable[[int], object] = _nothing


def synchronise(device: torch.device) -> None:
    """Wait until a device has done everything that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call."""
    synchronise(device)
    begun = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - begun


@torch.no_grad()
def in_rounds(arms: Sequence[Arm], rounds: int, device: torch.device, warm: int = 1) -> dict[str, list[float]]:
    """Return the seconds of every arm in every round.

    Each round starts with another arm. ``warm`` further rounds come first and are not counted. Gradients are off; an
    arm that trains turns them on.
    """
    times: dict[str, list[float]] = {arm.name: [] for arm in arms}
    gc.freeze()  # the garbage collector need not look through what there is already between two runs
    try:
        for number in range(-warm, rounds):
            first = number % len(arms) if arms else 0
            for arm in (*arms[first:], *arms[:first]):
                arm.prepare(number + warm)
                taken = timed(lambda arm=arm, number=number: arm.run(number + warm), device)  # type: ignore[misc]
                if number >= 0:
                    times[arm.name].append(taken)
    finally:
        gc.unfreeze()
    return times


class Summary(TypedDict):
    """Quantiles in milliseconds, and the number of runs."""

    p20_ms: float
    p50_ms: float
    p80_ms: float
    runs: int


def summary(seconds: Sequence[float]) -> Summary:
    """Return quantiles in milliseconds, and the number of runs."""
    low, middle, high = (round(1000 * quantile(seconds, share), 4) for share in (0.2, 0.5, 0.8))
    return {"p20_ms": low, "p50_ms": middle, "p80_ms": high, "runs": len(seconds)}


def quantile(values: Sequence[float], share: float) -> float:
    """Return the quantile at ``share`` (0 to 1), linear between neighbours."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def ratio(times: Mapping[str, Sequence[float]], over: str, under: str) -> float | None:
    """Return the median over the rounds of ``over`` / ``under``; None where one of them was not timed."""
    if not times.get(over) or not times.get(under):
        return None
    return round(statistics.median(a / b for a, b in zip(times[over], times[under], strict=True)), 4)


def median(seconds: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(seconds)
