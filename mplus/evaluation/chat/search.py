"""Search recall: whether memories find what questions need, without answering any."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import torch
from attrs import define, field

from mplus.config import JsonValue
from mplus.environment import run_info
from mplus.errors import InputError
from mplus.evaluation.abstention import auroc
from mplus.evaluation.chat.memories import digest
from mplus.evaluation.execution.base import Due
from mplus.evaluation.execution.generated import GeneratedAnswers
from mplus.memory.memory import Memory
from mplus.timing import median

DEPTHS = (1, 2, 4, 8)
"""Numbers of chunks among which the right one is looked for."""


@define(eq=False)
class SearchResult:
    """The results of searches in one memory.

    Attributes:
        ranks: of each question that was told, after how many chunks all that it needs was found; None: not among them.
        told, untold: best score of a chunk for each question; None: no chunk passed the threshold.
        seconds: of each search.
    """

    ranks: list[int | None] = field(factory=list)
    told: list[float | None] = field(factory=list)
    untold: list[float | None] = field(factory=list)
    seconds: list[float] = field(factory=list)

    def search(self, memory: Memory, due: Due) -> None:
        """Search for what a question needs."""
        begun = time.perf_counter()
        found = memory.search(due.question.prompt, max(DEPTHS), due.row)
        self.seconds.append(time.perf_counter() - begun)
        best = found[0].score if found else None
        if not due.question.told:
            self.untold.append(best)
            return
        self.told.append(best)
        # The rank of the last one that is needed: an answer may need several passages.
        missing, rank = due.sources(), None
        for place, one in enumerate(found, 1):
            missing -= {one.source or ""}
            if not missing:
                rank = place
                break
        self.ranks.append(rank)

    def plain(self) -> dict[str, JsonValue]:
        """Return recall by depth, what the threshold rejects, AUROC of the best score, and the time of a search."""
        facts: dict[str, JsonValue] = {
            "questions": len(self.ranks),
            "recall_at": {
                str(depth): _share([rank is not None and rank <= depth for rank in self.ranks]) for depth in DEPTHS
            },
            "told_rejected": _share([score is None for score in self.told]),
            "search_ms": round(1000 * median(self.seconds), 3),
        }
        if self.untold and self.told:
            known = [score for score in (*self.told, *self.untold) if score is not None]
            lowest = min(known, default=0.0) - 1  # of what found nothing: below every score
            told, untold = (
                torch.tensor([lowest if one is None else one for one in some]) for some in (self.told, self.untold)
            )
            facts["untold"] = len(self.untold)
            facts["untold_rejected"] = _share([score is None for score in self.untold])
            facts["auroc_of_score"] = round(auroc(told, untold), 4)
        return facts


def _share(held: Sequence[bool]) -> float:
    return round(sum(held) / len(held), 4)


def search_recall(executions: Iterable[tuple[str, GeneratedAnswers]], name: str | None = None) -> dict[str, JsonValue]:
    """Tell a task to memories, and search each for what its questions need; nothing is generated.

    Args:
        executions: by label, made when they are asked for, as for ``compare_memories``.
        name: what the report calls the model.

    Returns:
        Plain data: by memory what ``SearchResult.plain`` returns, with settings and circumstances.

    Raises:
        InputError: there is no memory, or nothing is asked that was told.
        NotSupported: a memory cannot be searched.
    """
    memories: dict[str, JsonValue] = {}
    facts: dict[str, JsonValue] = {}
    for label, execution in executions:
        result = SearchResult()
        for moment in execution.moments():
            for due in moment.due:
                result.search(moment.memory, due)
        if not result.ranks:
            raise InputError(f"{execution.task.name} must ask for something that was told to search for it")
        config = execution.model.mplus_config.to_dict()
        memories[label] = {"digest": digest(execution), **result.plain(), "config": config}
        facts = {
            "kind": "search",
            "protocol": execution.task.name,
            "settings": {"protocol": execution.task.settings()},
            "circumstances": run_info(model=name),
        }
    if not facts:
        raise InputError("there must be at least one memory to search, got none")
    return {**facts, "memories": memories}
