"""Curriculum: what is done on each step of a stage."""

from __future__ import annotations

from typing import Any

import attrs
import torch
from attrs import define, field

from mplus.training.batch import Turn
from mplus.training.data.counter_rng import Draws
from mplus.training.recipe.recipe import Entry, Stage


@define(frozen=True, eq=False)
class Plan:
    """What one step does.

    Attributes:
        main: the objective that was drawn.
        revisit: the turn kept earlier is read instead; ``main`` waits for another step.
        beside: objectives that are added.
    """

    main: Entry
    revisit: bool
    beside: tuple[Entry, ...] = ()


@define(eq=False)
class Curriculum:
    """Draws the objectives of a stage's steps, and keeps the turn that is to be read again.

    Draws are a function of the seed and the step, so they are the same in every process. The rules for reading
    earlier texts again are those of the released training: never right after one was kept, nor twice in a row, nor on
    a step that would write nothing anyway.

    Attributes:
        stage: what it draws from.
        seed: of the draws.
        kept: the turn to read again, or None.
        gap: chunks written since it was kept, counted from the next writing step on.
        last: whether the last writing step was a revisit, or nothing has been written yet.
    """

    stage: Stage
    seed: int
    kept: Turn | None = None
    gap: int = 0
    last: bool = True
    _renew: bool = field(default=False, init=False)

    def plan(self, step: int) -> Plan:
        """What step ``step`` (from 0) of the stage does; nothing changes but for the renewal it decides on."""
        draws = Draws(self.seed, "objective", step)
        main = self._main(draws.share())
        again, renew = draws.share(), draws.share()
        shares = {index: draws.share() for index in range(len(self.stage.beside))}
        beside = tuple(one for index, one in enumerate(self.stage.beside) if shares[index] < (one.beside or 0.0))
        revisit = self.stage.revisit
        if revisit is None or not main.objective.writes:
            return Plan(main, False, beside)
        self._renew = renew < revisit.renew
        possible = not self.last and self.gap > 0 and self.kept is not None
        return Plan(main, possible and again < revisit.probability, beside)

    def _main(self, drawn: float) -> Entry:
        entries = self.stage.main
        if len(entries) == 1:
            return entries[0]
        for entry in entries:
            drawn -= entry.probability or 0.0
            if drawn < 0:
                return entry
        return [entry for entry in entries if entry.probability][-1]  # sums of floats can stay below 1

    def forget(self) -> None:
        """The streams forgot everything: there is nothing to read again."""
        self.kept, self.gap, self.last = None, 0, True

    def done(self, plan: Plan, turn: Turn) -> None:
        """Take note of a step that was done with ``turn``."""
        if self.stage.revisit is None or not plan.main.objective.writes:
            return
        if not plan.revisit:
            if not self.last:
                self.gap += turn.chunks.shape[1]
            elif self.kept is None or self._renew:
                self.kept, self.gap = _text_of(turn), 0
        self.last = plan.revisit

    def state_dict(self) -> dict[str, Any]:
        """Everything that later steps depend on, as tensors and plain data."""
        kept = None if self.kept is None else attrs.asdict(self.kept, recurse=False)
        return {"kept": kept, "gap": self.gap, "last": self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.kept = None if state["kept"] is None else Turn(**state["kept"])
        self.gap, self.last = state["gap"], state["last"]


def _text_of(turn: Turn) -> Turn:
    """The turn without its chunks, which are not written again."""
    return attrs.evolve(turn, chunks=turn.chunks[:, :0], sources=torch.empty_like(turn.sources[:, :0]), fresh=False)
