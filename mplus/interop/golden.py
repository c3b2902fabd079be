"""Golden traces: what was recorded of a published model is done again by that model's trace player, and compared."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import ClassVar, cast

import torch
from attrs import define

from mplus.config import JsonValue
from mplus.errors import CheckpointError, DuplicateNameError, MissingDependencyError, PluginError, UnknownNameError
from mplus.interop.report import TOLERANCE, CaseReport, ErrorScale
from mplus.registry import Registry

STEPS = "steps.json"

Progress = Callable[[str, int, int], None]
"""``progress(case, step, steps)``, called after every step."""


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
        tolerance: largest error that passes, as the format of its cases says.
        tolerances: of quantities that have another one.
        error_scale: what a difference is divided by before.
    """

    quantities: ClassVar[tuple[str, ...]]
    tolerance: ClassVar[float] = TOLERANCE
    tolerances: ClassVar[Mapping[str, float]] = {}
    error_scale: ClassVar[ErrorScale] = "none"

    def __init__(self, folder: Path, backend: str, dtype: torch.dtype) -> None:
        self.folder, self.backend, self.dtype = folder, backend, dtype

    @property
    def compared(self) -> tuple[str, ...]:
        """Return the quantities of this case, in the order of tables; by default ``quantities``."""
        return self.quantities

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of steps."""

    @abstractmethod
    def play(self, report: CaseReport, *, reset: bool = False) -> Iterator[None]:
        """Do one step after the other and compare it in ``report``; yield after each.

        A step that cannot be had is named by ``report.skip(step, reason)``.

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
        "memo": "mplus.training.activations.player:MemoPlayer",
    },
)


@define(frozen=True)
class Case:
    """One thing that a trace player plays.

    Attributes:
        path: folder with ``steps.json``, or a JSON file with behaviours of systems.
        model: ``model`` in ``steps.json``, or the system.
    """

    path: Path
    model: str

    @property
    def name(self) -> str:
        """Return the name of the folder, or of the file and the system."""
        name = self.path.resolve().name
        return f"{name}, {self.model}" if self.path.is_file() else name

    def player(self) -> type[TracePlayer]:
        """Return the trace player of its model.

        Raises CheckpointError: no installed package plays cases of this model; PluginError: its player is broken.
        """
        try:
            return REPLAYS.get(self.model)
        except UnknownNameError as error:
            where = f"system of a case in {self.path}" if self.path.is_file() else f"model in {self.path / STEPS}"
            raise CheckpointError(
                f"{where} must be one of {', '.join(map(repr, REPLAYS.names()))}, got {self.model!r}: install the "
                f"package that announces a trace player of this name in the entry-point group {REPLAYS.group!r}"
            ) from error


def find_cases(folder: str | Path) -> list[Case]:
    """Return the case that ``folder`` is, or else the cases in it, by name: folders, then groups of JSON files.

    Args:
        folder: a folder, or a JSON file with behaviours of systems.

    Raises CheckpointError: there is none, or one is damaged.
    """
    folder = Path(folder)
    if (folder / STEPS).is_file():
        return [_folder_case(folder)]
    cases = [_folder_case(path.parent) for path in sorted(folder.glob(f"*/{STEPS}"))]
    for file in [folder] if folder.is_file() else sorted(folder.glob("*.json")):
        cases += _groups(file)
    if not cases:
        raise CheckpointError(
            f"{folder} must hold golden traces ({STEPS}, itself or in folders, or JSON files of cases), and holds none"
        )
    return cases


def _folder_case(folder: Path) -> Case:
    model = read_json(folder / STEPS).get("model")
    if not isinstance(model, str):
        raise CheckpointError(f"model in {folder / STEPS} must be the name of a model, got {model!r}")
    return Case(folder, model)


def _groups(file: Path) -> list[Case]:
    """Return a case for each system in a JSON file, in the order of the file; none where it is of another kind."""
    cases = read_json(file).get("cases")
    if not isinstance(cases, list):
        return []
    systems = [one.get("system") if isinstance(one, dict) else None for one in cases]
    if not all(isinstance(system, str) for system in systems):
        raise CheckpointError(f"every case in {file} must say which system it is about, got {systems}")
    return [Case(file, str(system)) for system in dict.fromkeys(systems)]


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
            ``trace.safetensors``), a JSON file with behaviours of systems, or a folder of both.
        backend: attention backend, by name.
        dtype: of weights, memory and computation: float32 or float64.
        reset: start every step from the recorded state; otherwise the memory evolves by itself from the first one.
        progress: called after every step.

    Of several cases those that no installed package plays have a report that says so (``unplayed``) and has not passed.

    Raises:
        CheckpointError: no cases there, a damaged one, or a single one of a model that no installed package plays.
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
    alone = (Path(folder) / STEPS).is_file()
    for case in find_cases(folder):
        numbers = str(dtype).removeprefix("torch.")
        try:
            kind = case.player()
        except (CheckpointError, PluginError, DuplicateNameError, MissingDependencyError) as error:
            if alone:
                raise
            yield CaseReport(case.name, case.model, backend, numbers, unplayed=str(error))
            continue
        player = kind(case.path, backend, dtype)
        report = CaseReport(
            case.name, case.model, backend, numbers, quantities=player.compared,
            tolerance=player.tolerance, tolerances=player.tolerances, scale=player.error_scale,
        )  # fmt: skip
        for _ in player.play(report, reset=reset):
            report.steps += 1
            if progress is not None:
                progress(report.name, report.steps, len(player))
        yield report
