"""Stopping a piece of work at any line it runs through, or looking at the disk there."""

from __future__ import annotations

import gc
import shutil
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

import torch

from mplus.hf.retrofit.context import current_pass

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


def _traced(work: Callable[[], Any], where: str, at_line: Callable[[int], None]) -> int:
    """Run ``work`` and call ``at_line(n)`` before its n-th line in files whose path has ``where`` in it."""
    count = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal count
        if where not in frame.f_code.co_filename:
            return None
        if event == "line":
            count += 1
            at_line(count)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def interrupted_everywhere(
    prepare: Callable[[], Any], work: Callable[[], Any], where: str, most: int = 100
) -> Iterator[int]:
    """Again and again, ``prepare`` and then ``work`` with a KeyboardInterrupt before one of its lines in ``where``.

    Yields after each interrupted run, up to ``most`` times: evenly over the run, and before each of the last lines.
    """
    prepare()
    lines = _traced(work, where, lambda line: None)
    last = most // 3
    places = {*range(1, lines - last, max(1, lines // (most - last))), *range(max(1, lines - last), lines + 1)}
    for place in sorted(places):

        def interrupt(line: int, place: int = place) -> None:
            if line == place:
                raise KeyboardInterrupt

        prepare()
        try:
            _traced(work, where, interrupt)
        except KeyboardInterrupt:
            assert current_pass() is None, f"the thread is still in a pass after an interrupt before line {place}"
            yield place


def interrupted_by_signals(prepare: Callable[[], Any], work: Callable[[], Any], times: int) -> Iterator[float]:
    """``prepare`` and ``work``, ``times`` times, each with a KeyboardInterrupt out of a signal a little later.

    Yields after each run that was interrupted; an interrupt in a finaliser is reported and lost. Where a signal strikes
    differs from run to run; what is claimed of the outcome has to hold everywhere.
    """

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    prepare()
    begun = time.perf_counter()
    work()
    whole = time.perf_counter() - begun
    before = signal.signal(signal.SIGALRM, interrupt)
    gc.disable()  # what is raised in a callback of the collector is lost
    try:
        for turn in range(times):
            prepare()
            delay = whole * (turn + 0.5) / times
            try:
                signal.setitimer(signal.ITIMER_REAL, delay)
                work()
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                torch.set_grad_enabled(True)  # one that strikes in the exit of torch.no_grad leaves gradients off
                yield delay
    finally:
        torch.set_grad_enabled(True)
        gc.enable()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def copies_on_the_way(work: Callable[[], Any], folder: Path, copies: Path) -> list[Path]:
    """Copies of ``folder`` in each state that it is in while ``work`` runs, first to last."""
    found: list[Path] = []
    seen: Any = None

    def look(line: int) -> None:
        nonlocal seen
        state = sorted((entry.name, entry.stat().st_size, entry.stat().st_ino) for entry in folder.iterdir())
        if state != seen:
            seen = state
            found.append(copies / str(len(found)))
            shutil.copytree(folder, found[-1])

    _traced(work, "mplus/memory/", look)
    look(0)
    return found
