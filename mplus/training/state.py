"""State of a training: what changes from step to step, and what a checkpoint has of it."""

from __future__ import annotations

from collections import deque
from typing import NotRequired, TypedDict

from attrs import define, field
from torch import Tensor

from mplus.config import JsonValue
from mplus.training.batch import Saved
from mplus.training.curriculum import CurriculumState


@define(eq=False)
class TrainerState:
    """Where an attempt is: what changes from step to step besides weights and what belongs to the stage.

    Attributes:
        stage, stage_step: number of the stage, and steps done in it.
        step: steps done in all stages.
        seconds: of training so far, those before a resume included.
        stages: what became of the stages that are over.
        recent: the newest values of the metric that the stage waits for.
    """

    stage: int = 0
    stage_step: int = 0
    step: int = 0
    seconds: float = 0.0
    stages: list[StageSummary] = field(factory=list)
    recent: deque[float] = field(factory=deque)


@define(eq=False)
class History:
    """The attempts of a run: their ``seeds``, what they ``missed``, and the seconds ``spent`` in those before this."""

    seeds: list[int]
    missed: list[str] = field(factory=list)
    spent: float = 0.0


class RandomState(TypedDict):
    """States of the generators that belong to a process: torch's, Python's, and of its GPU if it has one."""

    torch: Tensor
    python: tuple[int, tuple[int, ...], float | None]
    cuda: NotRequired[Tensor]


class Shared(TypedDict):
    """State that all processes have alike: trained weights, and the optimiser's tensors for each of them, by name."""

    weights: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]


class StageState(TypedDict):
    """The state of what one process has in a stage, as its parts return it."""

    streams: dict[str, Saved]
    sources: dict[str, dict[str, Saved]]
    curriculum: CurriculumState


class Own(TypedDict):
    """State of one process; ``stage_data`` is None between two stages."""

    random: RandomState
    means: dict[str, list[float]]
    stage_data: StageState | None


class StageSummary(TypedDict):
    """Summary of a stage that is over.

    ``name`` and ``steps``; where it had a goal, its ``metric``, the ``value`` of that and whether it was ``reached``;
    and what its data ``skipped``, data set -> reason -> count.
    """

    name: str
    steps: int
    metric: NotRequired[str]
    value: NotRequired[float]
    reached: NotRequired[bool]
    skipped: NotRequired[dict[str, dict[str, int]]]


class Position(TypedDict):
    """Where a run is: what can be read of a checkpoint without loading it.

    ``attempt``, ``seed``, and ``seeds``, ``missed`` and ``spent`` of all attempts; ``stage``, ``stage_step``, ``step``,
    ``seconds``, ``stages`` and ``recent`` as in ``TrainerState``.
    """

    attempt: int
    seed: int
    seeds: list[int]
    missed: list[str]
    spent: float
    stage: int
    stage_step: int
    step: int
    seconds: float
    stages: list[StageSummary]
    recent: list[float]


class Manifest(Position):
    """The content of ``checkpoint.json``: position, ``format``, and the fields of ``RunIdentity``."""

    format: int
    recipe: dict[str, JsonValue]
    base: str | None
    shapes: dict[str, list[int]]
    processes: int
