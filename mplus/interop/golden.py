"""Golden traces: what was recorded of a published model is done again by that model's trace player, and compared."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar, cast

import torch
from attrs import define, field
from torch import Tensor

from mplus.config import JsonValue
from mplus.errors import CheckpointError, UnknownNameError
from mplus.registry import Registry

STEPS = "steps.json"
TOLERANCE = 2e-5
"""Largest absolute error that passes; the traces themselves are float32."""

Progress = Callable[[str, int, int], None]
"""``progress(case, step, steps)``, called after every step."""


Quantity = Tensor | int | tuple[str | None, ...] | None
"""What a trace says exactly: whole numbers, flags and names."""


@define(eq=False)
class CaseReport:
    """Comparison of one case with its trace.

    Attributes:
        name: folder name of the case.
        model: that was recorded ("mplus").
        backend, dtype: what it was replayed with.
        steps: steps replayed.
        errors: largest absolute error by quantity; infinite where shapes differ or a number is NaN; a quantity is
            absent where the case has nothing of it.
        equal: whether everything that must be equal is, by quantity.
        differences: for each quantity that is off, where its largest or first difference is.
        quantities: what its player compares.
    """

    name: str
    model: str
    backend: str
    dtype: str
    steps: int = 0
    errors: dict[str, float] = field(factory=dict)
    equal: dict[str, bool] = field(factory=dict)
    differences: dict[str, str] = field(factory=dict)
    quantities: tuple[str, ...] = ()

    @property
    def worst(self) -> float:
        """The largest of all errors."""
        return max(self.errors.values(), default=0.0)

    def passed(self, tolerance: float = TOLERANCE) -> bool:
        """Return whether every error is within ``tolerance`` and everything that must be equal is."""
        return self.steps > 0 and self.worst <= tolerance and all(self.equal.values())

    def measure(self, quantity: str, where: str, ours: Tensor, recorded: Tensor) -> None:
        """Note the largest absolute difference of two tensors."""
        error = _error(ours, recorded)
        if error > self.errors.setdefault(quantity, 0.0):
            self.errors[quantity] = error
            shapes = "" if ours.shape == recorded.shape else f", shape {list(ours.shape)} for {list(recorded.shape)}"
            self.differences[quantity] = where + shapes

    def demand(self, quantity: str, where: str, ours: Quantity, recorded: Quantity) -> None:
        """Note whether two values, or tensors of whole numbers, are equal."""
        if isinstance(ours, Tensor) and isinstance(recorded, Tensor):
            same = ours.shape == recorded.shape and bool((ours.cpu() == recorded).all())
        else:
            same = bool(ours == recorded)
        self.equal[quantity] = self.equal.get(quantity, True) and same
        if not same:
            self.differences.setdefault(quantity, where)


def _error(ours: Tensor, recorded: Tensor) -> float:
    if ours.shape != recorded.shape:
        return float("inf")
    if not ours.numel():
        return 0.0
    error = float((ours.detach().cpu().double() - recorded.double()).abs().max())
    return float("inf") if error != error else error  # noqa: PLR0124 - NaN is the number that differs from itself


class TracePlayer(ABC):
    """Does the steps of one case again. Built as ``Player(folder, backend, dtype)``, on the CPU.

    A package announces its class in the entry-point group ``mplus.replays``, under the name that its cases have in the
    field ``model`` of ``steps.json``. Everything else in a case (weights, tensors, what a step says) is the player's.

    Example:
        >>> class HMTPlayer(TracePlayer):
        ...     quantities = ("logits", "recalled prompt")
        ...
        ...     def __len__(self):
        ...         return len(self.steps)
        ...
        ...     def play(self, report, *, reset=False):
        ...         for step in self.steps:
        ...             report.measure("logits", f"step {step.index}", self.forward(step.ids), step.logits)
        ...             yield

    Attributes:
        quantities: what it compares, in the order of tables; a case need not have something of each.
    """

    quantities: ClassVar[tuple[str, ...]]

    def __init__(self, folder: Path, backend: str, dtype: torch.dtype) -> None:
        self.folder, self.backend, self.dtype = folder, backend, dtype

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of steps."""

    @abstractmethod
    def play(self, report: CaseReport, *, reset: bool = False) -> Iterator[None]:
        """Do one step after the other and compare it in ``report``; yield after each.

        Args:
            report: of the case.
            reset: start every step from the recorded state instead of the own one.

        Raises:
            CheckpointError: the case is damaged.
        """


REPLAYS: Registry[TracePlayer] = Registry(
    "trace player",
    group="mplus.replays",
    base="mplus.interop.golden:TracePlayer",
    builtin={
        "mplus": "mplus.interop.published_player:PublishedPlayer",
        "memoryllm": "mplus.interop.published_player:PublishedPlayer",
    },
)


def player_of(case: Path) -> type[TracePlayer]:
    """Return the trace player of a case, found by the field ``model`` of its ``steps.json``.

    Raises:
        CheckpointError: the file is damaged, or no installed package plays cases of this model.
    """
    plain = read_json(case / STEPS)
    model = plain.get("model")
    if not isinstance(model, str):
        raise CheckpointError(f"model in {case / STEPS} must be the name of a model, got {model!r}")
    try:
        return REPLAYS.get(model)
    except UnknownNameError as error:
        raise CheckpointError(
            f"model in {case / STEPS} must be one of {', '.join(map(repr, REPLAYS.names()))}, got {model!r}: install "
            f"the package that announces a trace player of this name in the entry-point group {REPLAYS.group!r}"
        ) from error


def find_cases(folder: str | Path) -> list[Path]:
    """Return ``folder`` if it is a case, else the cases in it, by name. Raises CheckpointError when there is none."""
    folder = Path(folder)
    if (folder / STEPS).is_file():
        return [folder]
    cases = sorted(path.parent for path in folder.glob(f"*/{STEPS}"))
    if not cases:
        raise CheckpointError(f"{folder} must hold golden traces ({STEPS}), itself or in folders, and holds none")
    return cases


def read_json(path: Path) -> dict[str, JsonValue]:
    """Read a JSON object. Raises CheckpointError when there is none."""
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} must be a readable JSON file: {error}") from error
    if not isinstance(plain, dict):
        raise CheckpointError(f"{path} must be a JSON object")
    return cast("dict[str, JsonValue]", plain)


def replay(
    folder: str | Path,
    backend: str = "auto",
    dtype: torch.dtype = torch.float32,
    *,
    reset: bool = False,
    progress: Progress | None = None,
) -> list[CaseReport]:
    """Replay a case, or all cases in a folder, on the CPU.

    Args:
        folder: a case (``steps.json`` and what its player needs: of M+ ``config.json``, ``state_dict.safetensors`` and
            ``trace.safetensors``) or a folder of cases.
        backend: attention backend, by name.
        dtype: of weights, memory and computation: float32 or float64.
        reset: start every step from the recorded state; otherwise the memory evolves by itself from the first one.
        progress: called after every step.

    Raises:
        CheckpointError: no cases there, a damaged one, or one of a model that no installed package plays.
        UnknownNameError: no such backend.
    """
    return list(replay_cases(folder, backend, dtype, reset=reset, progress=progress))


def replay_cases(
    folder: str | Path,
    backend: str = "auto",
    dtype: torch.dtype = torch.float32,
    *,
    reset: bool = False,
    progress: Progress | None = None,
) -> Iterator[CaseReport]:
    """Replay case by case, as ``replay`` does all."""
    if dtype not in (torch.float32, torch.float64):
        raise CheckpointError(f"golden traces are compared in torch.float32 or torch.float64, got {dtype}")
    for case in find_cases(folder):
        player = player_of(case)(case, backend, dtype)
        model = str(read_json(case / STEPS)["model"])
        name, numbers = case.resolve().name, str(dtype).removeprefix("torch.")
        report = CaseReport(name, model, backend, numbers, quantities=player.quantities)
        for _ in player.play(report, reset=reset):
            report.steps += 1
            if progress is not None:
                progress(report.name, report.steps, len(player))
        yield report
