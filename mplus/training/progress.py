"""A progress bar for a stage, with its newest metrics."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

SHOWN = ("loss", "accuracy", "retriever_loss", "window_loss", "window_accuracy")
Advance = Callable[[Mapping[str, float] | None], None]


@contextmanager
def stage_bar(title: str, done: int, total: int, wanted: bool | None) -> Iterator[Advance]:
    """Show a bar; yields ``advance(metrics or None)``, to be called once a step. ``wanted`` None: on a terminal."""
    if wanted is None:
        wanted = sys.stderr.isatty()
    if not wanted:
        yield lambda metrics: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, completed=done)

        def advance(metrics: Mapping[str, float] | None) -> None:
            bar.advance(task)
            if metrics is not None:
                found = [f"{name} {metrics[name]:.3f}" for name in SHOWN if name in metrics]
                bar.update(task, description="  ".join(found))

        yield advance
