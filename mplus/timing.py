"""Timing several ways of doing one thing in turns, so that what disturbs one of them disturbs all."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from attrs import define

QUANTILES = (20, 50, 80)


def _nothing(turn: int) -> None:
    pass


@define(frozen=True, eq=False)
class Arm:
    """One way of doing it.

    Attributes:
        name: in tables and records.
        run: is timed; gets the number of the round, so that all arms can take the same input in a round.
        prepare: runs before it and is not timed.
    """

    name: str
    run: Callable[[int], Any]
    prepare: Callable[[int], Any] = _nothing


def synchronise(device: torch.device) -> None:
    """Wait for everything that was asked of a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call."""
    synchronise(device)
    begun = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - begun


@torch.no_grad()
def in_rounds(arms: Sequence[Arm], rounds: int, device: torch.device, warm: int = 1) -> dict[str, list[float]]:
    """Seconds of every arm in every round; each round starts with another arm. Further ``warm`` rounds come first."""
    times: dict[str, list[float]] = {arm.name: [] for arm in arms}
    gc.freeze()  # what there is already need not be looked through between two runs
    try:
        for turn in range(-warm, rounds):
            first = turn % len(arms) if arms else 0
            for arm in (*arms[first:], *arms[:first]):
                arm.prepare(turn + warm)
                taken = timed(lambda arm=arm, turn=turn: arm.run(turn + warm), device)  # type: ignore[misc]
                if turn >= 0:
                    times[arm.name].append(taken)
    finally:
        gc.unfreeze()
    return times


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """Quantiles in milliseconds and how many runs they are of."""
    return {**{f"p{q}_ms": round(1000 * quantile(seconds, q / 100), 4) for q in QUANTILES}, "runs": len(seconds)}


def quantile(values: Sequence[float], share: float) -> float:
    """Linear between neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def ratio(times: Mapping[str, Sequence[float]], over: str, under: str) -> float | None:
    """Median over the rounds of the time of ``over`` by that of ``under``; None where one was not measured."""
    if not times.get(over) or not times.get(under):
        return None
    return round(statistics.median(a / b for a, b in zip(times[over], times[under], strict=True)), 4)


def median(seconds: Sequence[float]) -> float:
    """Of times in seconds."""
    return statistics.median(seconds)
