"""What a memory is trained on: documents of any kind, and generated texts, as sources of batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mplus.registry import Registry

if TYPE_CHECKING:
    from mplus.training.batch import BatchSource

__all__ = ["SOURCES"]

SOURCES: Registry[BatchSource] = Registry(
    "data source",
    group="mplus.sources",
    base="mplus.training.batch:BatchSource",
    builtin={
        "documents": "mplus.training.data.document_batches:DocumentBatches",
        "copying": "mplus.training.data.generated.copying:CopyingBatches",
        "questions": "mplus.training.data.generated.questions:QuestionBatches",
        "recall": "mplus.training.data.generated.facts:RecallBatches",
    },
)
