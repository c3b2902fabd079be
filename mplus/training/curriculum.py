"""Curriculum: what is done on each step of a stage."""

from __future__ import annotations

from typing import Any, TypedDict

import attrs
import torch
from attrs import define, field

from mplus.training.batch import Batch
from mplus.training.data.counter_rng import CounterRNG
from mplus.training.recipe.recipe import Entry, Stage


@define(frozen=True, eq=False)
class StepPlan:
    """The objectives of one step.

    Attributes:
        main: the objective that was drawn.
        revisit: the batch kept earlier is read instead; ``main`` waits for another step.
        beside: objectives that are added.
    """

    main: Entry
    revisit: bool
    beside: tuple[Entry, ...] = ()


class CurriculumState(TypedDict):
    """State of a curriculum in a checkpoint: ``revisit_batch`` by field, ``chunks_since``, ``last_was_revisit``."""

    kept: dict[str, Any] | None
    gap: int
    last: bool


@define(eq=False)
class Curriculum:
    """Draws the objectives of a stage's steps, and keeps the batch that is to be read again.

    Draws are a function of the seed and the step, so they are the same in every process. The rules for reading
    earlier texts again are those of the released training: never right after one was kept, nor twice in a row, nor on
    a step that would write nothing anyway.

    Attributes:
        stage: what it draws from.
        seed: of the draws.
        revisit_batch: the batch to read again, or None.
        chunks_since: chunks written since it was kept, counted from the next writing step on.
        last_was_revisit: whether the last writing step was a revisit, or nothing has been written yet.
    """

    stage: Stage
    seed: int
    revisit_batch: Batch | None = None
    chunks_since: int = 0
    last_was_revisit: bool = True
    _renew: bool = field(default=False, init=False)

    def plan(self, step: int) -> StepPlan:
        """Return the objectives of step ``step``, from 0; changes only whether a text is renewed after it."""
        draws = CounterRNG(self.seed, "objective", step)
        main = self._main(draws.uniform())
        # Drawn whether they are needed or not, so that later draws of the step do not depend on what was chosen.
        again, renew = draws.uniform(), draws.uniform()
        shares = {index: draws.uniform() for index in range(len(self.stage.beside))}
        beside = tuple(one for index, one in enumerate(self.stage.beside) if shares[index] < (one.beside or 0.0))
        revisit = self.stage.revisit
        if revisit is None or not main.objective.writes:
            return StepPlan(main, False, beside)
        self._renew = renew < revisit.renew
        possible = not self.last_was_revisit and self.chunks_since > 0 and self.revisit_batch is not None
        return StepPlan(main, possible and again < revisit.probability, beside)

    def _main(self, drawn: float) -> Entry:
        entries = self.stage.main
        if len(entries) == 1:
            return entries[0]
        for entry in entries:
            drawn -= entry.probability or 0.0
            if drawn < 0:
                return entry
        return [entry for entry in entries if entry.probability][-1]  # sums of floats can stay below 1

    def reset(self) -> None:
        """Drop the kept text, since the streams forgot everything."""
        self.revisit_batch, self.chunks_since, self.last_was_revisit = None, 0, True

    def record(self, plan: StepPlan, batch: Batch) -> None:
        """Take note of a step that was done with ``batch``."""
        if self.stage.revisit is None or not plan.main.objective.writes:
            return
        if not plan.revisit:
            if not self.last_was_revisit:
                self.chunks_since += batch.chunks.shape[1]
            elif self.revisit_batch is None or self._renew:
                # Without its chunks, which are not written again.
                none, sources = batch.chunks[:, :0], torch.empty_like(batch.sources[:, :0])
                self.revisit_batch = attrs.evolve(batch, chunks=none, sources=sources, reset=False)
                self.chunks_since = 0
        self.last_was_revisit = plan.revisit

    def state_dict(self) -> CurriculumState:
        """Return everything that later steps depend on, as tensors and plain data."""
        kept = None if self.revisit_batch is None else attrs.asdict(self.revisit_batch, recurse=False)
        return {"kept": kept, "gap": self.chunks_since, "last": self.last_was_revisit}

    def load_state_dict(self, state: CurriculumState) -> None:
        """Go on from a saved state."""
        self.revisit_batch = None if state["kept"] is None else Batch(**state["kept"])
        self.chunks_since, self.last_was_revisit = state["gap"], state["last"]
