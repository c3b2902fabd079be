"""Data that a memory is trained on, as sources of batches by name, and the names one needs to write another.

A source derives from ``BatchSource``; ``mplus.testing.sources.SourceConformance`` tries it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mplus.registry import Registry, lazy_exports

if TYPE_CHECKING:
    from mplus.config import flag, must_be, number, one_of, options_of, whole
    from mplus.training.batch import Batch, BatchSource
    from mplus.training.data.counter_rng import CounterRNG

__all__ = [
    "SOURCES",
    "Batch",
    "BatchSource",
    "CounterRNG",
    "flag",
    "must_be",
    "number",
    "one_of",
    "options_of",
    "whole",
]

SOURCES: Registry[BatchSource] = Registry(
    "data source",
    group="mplus.sources",
    base="mplus.training.batch:BatchSource",
    builtin={
        "documents": "mplus.training.data.document_batches:DocumentBatches",
        "copying": "mplus.training.data.generated.copying:CopyingBatches",
        "questions": "mplus.training.data.generated.questions:QuestionBatches",
        "notes": "mplus.training.data.generated.notes:NoteBatches",
        "recall": "mplus.training.data.generated.facts:RecallBatches",
    },
)

__getattr__, __dir__ = lazy_exports(
    "mplus.training.data",
    {
        "mplus.config": ("flag", "must_be", "number", "one_of", "options_of", "whole"),
        "mplus.training.batch": ("Batch", "BatchSource"),
        "mplus.training.data.counter_rng": ("CounterRNG",),
    },
)
