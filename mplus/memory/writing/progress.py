"""A progress bar for long writes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LONG = 16
"""Chunks from which a bar is shown in a terminal when nobody asked."""


@contextmanager
def progress_bar(
    title: str, total: int | None, wanted: bool | None, steps: int, unit: str = "tokens"
) -> Iterator[Callable[[int], None]]:
    """Yield ``advance(units)``; ``total`` None: unknown. ``wanted`` None: for ``LONG`` steps, on a terminal."""
    if wanted is None:
        wanted = steps >= LONG and sys.stderr.isatty()
    if not wanted:
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.advance(task, done)
