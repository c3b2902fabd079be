"""What a memory is trained on: documents of any kind, and generated texts, as sources of turns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mplus.registry import Registry

if TYPE_CHECKING:
    from mplus.training.turns import TurnSource

__all__ = ["SOURCES"]

SOURCES: Registry[TurnSource] = Registry(
    "data source",
    group="mplus.sources",
    base="mplus.training.turns:TurnSource",
    builtin={
        "documents": "mplus.training.data.document_turns:DocumentTurns",
        "copying": "mplus.training.data.copying:CopyingTurns",
        "questions": "mplus.training.data.questions:QuestionTurns",
        "recall": "mplus.training.recall.turns:RecallTurns",
    },
)
