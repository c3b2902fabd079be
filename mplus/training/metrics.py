"""Metrics of a run: means over steps and processes, lines of JSON, TensorBoard, and a progress bar."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeAlias

from mplus.training.parallel import gather_objects
from mplus.training.run_folder import METRICS, TENSORBOARD, RunFolder

MetricsLine: TypeAlias = dict[str, str | int | float]
"""A line of metrics: ``attempt``, ``step``, ``stage``, and metrics by name."""


class _Board(Protocol):
    """``torch.utils.tensorboard.SummaryWriter``."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class RunningMeans:
    """Means of metrics over steps, then over processes; a step that lacks a metric does not count for it."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}

    def add(self, metrics: Mapping[str, float]) -> None:
        """Take the metrics of one step."""
        for name, value in metrics.items():
            entry = self.sums.setdefault(name, [0.0, 0.0])
            entry[0] += value
            entry[1] += 1

    def reduce(self) -> dict[str, float]:
        """Return the means over all processes since the last call. All processes must call it."""
        total: dict[str, list[float]] = {}
        for sums in gather_objects(self.sums):
            for name, (value, count) in sums.items():
                entry = total.setdefault(name, [0.0, 0.0])
                entry[0] += value
                entry[1] += count
        self.sums = {}
        return {name: value / count for name, (value, count) in total.items()}


class MetricsLog:
    """Records with the keys ``attempt``, ``step``, ``stage`` and metrics; kept, and written where there is a folder.

    Args:
        folder: of the run; None: records are only kept.
    """

    def __init__(self, folder: RunFolder | None) -> None:
        self.records: list[MetricsLine] = []
        self._folder = folder
        self._board: _Board | None = None
        if folder is not None and importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            with folder.writing():
                self._board = SummaryWriter(str(folder.path / TENSORBOARD))

    @property
    def has_board(self) -> bool:
        """Return whether TensorBoard gets them too: where it is installed."""
        return self._board is not None

    @property
    def _path(self) -> Path | None:
        return None if self._folder is None else self._folder.path / METRICS

    def write(self, record: MetricsLine) -> None:
        """Take one record. Raises CheckpointError when it cannot be written."""
        self.records.append(dict(record))
        if self._folder is None or self._path is None:
            return
        with self._folder.writing():
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            if self._board is not None:
                step = int(record["step"])
                for name, value in record.items():
                    if isinstance(value, float):
                        self._board.add_scalar(f"{record['attempt']}/{name}", value, step)
                self._board.flush()

    def rewind(self, attempt: int, step: int) -> None:
        """Go on after ``step`` of ``attempt``: records of later steps, which will come again, are dropped."""
        if self._folder is None or self._path is None or not self._path.exists():
            return
        lines = self._path.read_text(encoding="utf-8").splitlines()
        self.records = [
            record
            for record in map(json.loads, filter(None, lines))
            if (record["attempt"], record["step"]) <= (attempt, step)
        ]
        with self._folder.writing():
            text = "".join(json.dumps(record) + "\n" for record in self.records)
            self._path.write_text(text, encoding="utf-8")

    def close(self) -> None:
        """Close TensorBoard's file."""
        if self._board is not None:
            self._board.close()


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
