"""StageData: what a stage is trained with, batch by batch."""

from __future__ import annotations

from collections import Counter

from attrs import define

from mplus.mechanisms.streams import TrainingStreams
from mplus.training.batch import Batch, BatchSource
from mplus.training.curriculum import Curriculum, StepPlan
from mplus.training.objectives import OBJECTIVES
from mplus.training.parallel import gather_objects
from mplus.training.recipe.recipe import Entry, Stage
from mplus.training.state import StageState
from mplus.training.step import LossTerm


@define(eq=False)
class StageData:
    """Streams, data and curriculum of one stage, all of them this process's own.

    Attributes:
        stage: of the recipe.
        streams: the memories that are written and read.
        sources: batches, by name of the data set.
        curriculum: says which objectives a step has.
    """

    stage: Stage
    streams: TrainingStreams
    sources: dict[str, BatchSource]
    curriculum: Curriculum

    def terms(self, plan: StepPlan) -> tuple[Batch, list[LossTerm]]:
        """Return the batch of the main objective, and all that the step computes."""
        if plan.revisit and self.curriculum.revisit_batch is not None and self.stage.revisit is not None:
            batch = self.curriculum.revisit_batch
            objective = OBJECTIVES.get("revisit")()
            terms = [LossTerm("revisit", objective, batch, self.stage.revisit.weight, self.stage.retriever_loss)]
        else:
            batch = self._next_batch(plan.main)
            terms = [self._term(plan.main, batch)]
        for entry in plan.beside:
            shared = entry.data is None or (entry.data == plan.main.data and not entry.objective.writes)
            terms.append(self._term(entry, batch if shared else self._next_batch(entry)))
        return batch, terms

    def _next_batch(self, entry: Entry) -> Batch:
        objective = entry.objective
        batch = self.sources[str(entry.data)].next_batch(objective.chunks, repeat=objective.repeats)
        if batch.reset:
            self.streams.reset()
            self.curriculum.reset()
        return batch

    def _term(self, entry: Entry, batch: Batch) -> LossTerm:
        alike = [other for other in self.stage.objectives if other.name == entry.name]
        label = entry.name if len(alike) == 1 else f"{entry.name}({entry.data})"
        return LossTerm(label, entry.objective, batch, entry.weight, self.stage.retriever_loss)

    def skipped(self) -> dict[str, dict[str, int]]:
        """Return the documents that data passed over in this stage, of all processes: data set -> reason -> count."""
        found: dict[str, Counter[str]] = {}
        for counts in gather_objects({name: getattr(source, "skipped", {}) for name, source in self.sources.items()}):
            for name, some in counts.items():
                found.setdefault(name, Counter()).update(some)
        return {name: dict(counts) for name, counts in found.items() if counts}

    def state_dict(self) -> StageState:
        """Return what a checkpoint has of it."""
        return {
            "streams": self.streams.state_dict(),
            "sources": {name: source.state_dict() for name, source in self.sources.items()},
            "curriculum": self.curriculum.state_dict(),
        }

    def load_state_dict(self, state: StageState) -> None:
        """Go on from what ``state_dict`` returned."""
        self.streams.load_state_dict(state["streams"])
        for name, source in self.sources.items():
            source.load_state_dict(state["sources"][name])
        self.curriculum.load_state_dict(state["curriculum"])
