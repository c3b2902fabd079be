"""What a memory is trained on: documents of any kind, and generated texts, as sources of turns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mplus.registry import Registry

if TYPE_CHECKING:
    from mplus.training.batch import TurnSource

__all__ = ["SOURCES"]

SOURCES: Registry[TurnSource] = Registry(
    "data source",
    group="mplus.sources",
    base="mplus.training.batch:TurnSource",
    builtin={
        "documents": "mplus.training.data.document_turns:DocumentTurns",
        "copying": "mplus.training.data.generated.copying:CopyingTurns",
        "questions": "mplus.training.data.generated.questions:QuestionTurns",
        "recall": "mplus.training.data.generated.facts:RecallTurns",
    },
)
