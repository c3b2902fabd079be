"""Recipe: all that a training is made of, as validated attrs classes read from TOML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import attrs
from attrs import define, field

from mplus.config import JsonValue, MPlusConfig, flag, number, one_of, options_of, structure, whole
from mplus.errors import ConfigError
from mplus.training.data.options import share, text
from mplus.training.objectives import OBJECTIVES
from mplus.training.objectives.base import Objective
from mplus.training.objectives.losses import RetrieverLoss
from mplus.training.recipe.tables import (
    Checkpoints,
    DataSet,
    Metrics,
    ModelTable,
    NewTokenizer,
    Optimizer,
    plain_name,
)

ENTRY = ("name", "data", "probability", "beside", "weight")
"""Fields of an objective's table; the others are its options."""
SIZES = ("memory_tokens_per_chunk", "short_term_tokens", "retrieved_tokens", "long_term_tokens")
"""Sizes of a memory that a stage can have to itself: no parameter has their shape."""


@define(frozen=True, kw_only=True)
class Entry:
    """An objective of a stage, or of a validation.

    Attributes:
        name: of the objective.
        data: the data set its batches come from; None, for one that stands ``beside``: the main one's batch.
        probability: share of the steps it is the main objective of; those of a stage make 1. None, where it is the
            only one: 1.
        beside: instead, the share of the steps on which it is added to the main objective.
        weight: factor on its loss.
        options: of the objective.
        objective: built from these.
    """

    name: str
    data: str | None = field(default=None)
    probability: float | None = field(default=None, validator=attrs.validators.optional(share))
    beside: float | None = field(default=None, validator=attrs.validators.optional(share))
    weight: float = field(default=1.0, validator=number(0))
    options: dict[str, JsonValue] = field(factory=dict)
    objective: Objective = field(eq=False)

    @staticmethod
    def of(table: JsonValue) -> Entry:
        """Read fields and options from one table."""
        name = table.get("name") if isinstance(table, Mapping) else None
        if not isinstance(table, Mapping) or not isinstance(name, str):
            raise ConfigError(
                f"an objective must be a table with a 'name' ({', '.join(OBJECTIVES.names())}), got {table!r}"
            )
        own = {key: value for key, value in table.items() if key in ENTRY}
        options = {key: value for key, value in table.items() if key not in ENTRY}
        cls = OBJECTIVES.get(name)
        return structure(Entry, {**own, "options": options, "objective": cls(options_of(cls, options))})

    def to_dict(self) -> dict[str, JsonValue]:
        """Return the table."""
        return {**{name: getattr(self, name) for name in ENTRY}, **self.options}


@define(frozen=True, kw_only=True)
class Revisit:
    """A text of an earlier step is read again, after other chunks were written (M+ section 3.3).

    Attributes:
        probability: chance of it on a step that would write and may be one instead: not the first after a text was
            kept, and not right after another revisit.
        renew: chance that a text is kept in place of the one kept before, on the step after a revisit. Below 1 a text
            is read again and again at growing distance.
        weight: factor on the loss.
    """

    probability: float = field(default=0.2, validator=share)
    renew: float = field(default=1.0, validator=share)
    weight: float = field(default=1.0, validator=number(0))


@define(frozen=True, kw_only=True)
class Until:
    """A stage ends once ``metric``, its mean over the last ``window`` steps, is ``at_least`` so much."""

    metric: str = field(validator=text)
    at_least: float = field(validator=number(float("-inf")))
    window: int = field(default=20, validator=whole(1))


@define(frozen=True, kw_only=True)
class Stage:
    """A part of the training with streams of its own.

    Attributes:
        name: shown and recorded.
        steps: optimiser steps; with ``until``, the most.
        objectives: what is done on a step.
        memory: sizes of ``SIZES`` that differ from those of the recipe's memory while the stage lasts, so that a memory
            can begin with a row for every token and be thinned stage by stage.
        revisit: whether and how often earlier texts are read again.
        retriever_loss: None: the retriever learns nothing.
        long_term: whether streams have long-term memory.
        streams: of each process, instead of the recipe's.
        until: what is to be reached.
        on_failure: without it after ``steps``: "restart" everything with another seed, "stop", or "continue".
    """

    name: str = field(validator=plain_name)
    steps: int = field(validator=whole(1))
    objectives: tuple[Entry, ...]
    memory: dict[str, int] = field(factory=dict)
    revisit: Revisit | None = None
    retriever_loss: RetrieverLoss | None = None
    long_term: bool = field(default=False, validator=flag)
    streams: int | None = field(default=None, validator=whole(1, optional=True))
    until: Until | None = None
    on_failure: Literal["restart", "stop", "continue"] = field(
        default="stop", validator=one_of("restart", "stop", "continue")
    )

    @property
    def main(self) -> tuple[Entry, ...]:
        """Objectives of which every step has one."""
        return tuple(entry for entry in self.objectives if entry.beside is None)

    @property
    def beside(self) -> tuple[Entry, ...]:
        """Objectives that are added."""
        return tuple(entry for entry in self.objectives if entry.beside is not None)


@define(frozen=True, kw_only=True)
class Validation:
    """Losses on other data, with memories of their own; training goes on as if it had not been.

    Attributes:
        every_steps: how often; also at the end.
        steps: batches per objective.
        objectives: as in a stage, without ``probability`` and ``beside``.
        long_term: whether their streams have long-term memory.
        streams: of each process; None: the recipe's.
    """

    every_steps: int = field(validator=whole(1))
    steps: int = field(default=20, validator=whole(1))
    objectives: tuple[Entry, ...]
    long_term: bool = field(default=False, validator=flag)
    streams: int | None = field(default=None, validator=whole(1, optional=True))


@define(frozen=True, kw_only=True)
class Recipe:
    """Everything that a training is made of; see the page "Training".

    Attributes:
        name: of the recipe, and by default of the run's folder.
        seed: of weights, data, memories and choices.
        streams: memories that each process trains at a time.
        restarts: how often all may begin anew with another seed, where a stage asks for it.
        data: data sets by name.
    """

    name: str = field(validator=plain_name)
    seed: int = field(default=0, validator=whole(0))
    streams: int = field(default=8, validator=whole(1))
    restarts: int = field(default=3, validator=whole(0))
    model: ModelTable
    memory: MPlusConfig = field(factory=MPlusConfig)
    optimizer: Optimizer = field(factory=Optimizer)
    checkpoints: Checkpoints = field(factory=Checkpoints)
    metrics: Metrics = field(factory=Metrics)
    data: dict[str, DataSet]
    stages: tuple[Stage, ...]
    validation: Validation | None = None

    @property
    def steps(self) -> int:
        """The most steps of all stages together."""
        return sum(stage.steps for stage in self.stages)

    @property
    def falling_steps(self) -> int:
        """Steps over which the learning rate falls: of all stages from ``optimizer.fall_from`` on."""
        return self.falling_steps_before(len(self.stages), 0)

    def falling_steps_before(self, stage: int, stage_step: int) -> int:
        """Return how many of those lie before step ``stage_step`` of stage ``stage``; past stages count in full."""
        names = [one.name for one in self.stages]
        first = 0 if self.optimizer.fall_from is None else names.index(self.optimizer.fall_from)
        if stage < first:
            return 0
        return sum(one.steps for one in self.stages[first:stage]) + stage_step

    def to_dict(self) -> dict[str, JsonValue]:
        """Return plain data that ``parse_recipe`` reads back, with all defaults but those of data and objectives."""
        found = attrs.asdict(self, recurse=False)
        for name in ("optimizer", "checkpoints", "metrics"):
            found[name] = attrs.asdict(found[name])
        model = attrs.asdict(self.model, recurse=False)
        model["build"] = None if self.model.build is None else self.model.build.to_dict()
        if isinstance(self.model.tokenizer, NewTokenizer):
            model["tokenizer"] = attrs.asdict(self.model.tokenizer)
        found["model"], found["memory"] = model, self.memory.to_dict()
        found["data"] = {name: {"kind": data.kind, **data.options} for name, data in self.data.items()}
        found["stages"] = [_plain_steps(stage) for stage in self.stages]
        found["validation"] = None if self.validation is None else _plain_steps(self.validation)
        return found


def _plain_steps(thing: Stage | Validation) -> dict[str, JsonValue]:
    entries = [entry.to_dict() for entry in thing.objectives]
    return {**attrs.asdict(thing, filter=lambda attribute, _: attribute.name != "objectives"), "objectives": entries}
