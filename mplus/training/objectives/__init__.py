"""Objectives that a recipe composes by name, and the names one needs to write another.

An objective derives from ``Objective``; ``mplus.testing.objectives.ObjectiveConformance`` tries it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mplus.registry import Registry, lazy_exports

if TYPE_CHECKING:
    from mplus.config import flag, must_be, number, one_of, options_of, whole
    from mplus.mechanisms.streams import TrainingStreams
    from mplus.training.batch import Batch
    from mplus.training.decoder import TrainedDecoder
    from mplus.training.objectives.base import Objective, ObjectiveResult
    from mplus.training.objectives.full_memory import full_read
    from mplus.training.objectives.losses import RetrieverLoss, accuracy, token_loss

__all__ = [
    "OBJECTIVES",
    "Batch",
    "Objective",
    "ObjectiveResult",
    "RetrieverLoss",
    "TrainedDecoder",
    "TrainingStreams",
    "accuracy",
    "flag",
    "full_read",
    "must_be",
    "number",
    "one_of",
    "options_of",
    "token_loss",
    "whole",
]

OBJECTIVES: Registry[Objective] = Registry(
    "objective",
    group="mplus.objectives",
    base="mplus.training.objectives.base:Objective",
    builtin={
        "plain_lm": "mplus.training.objectives.full_memory:PlainLM",
        "two_chunk": "mplus.training.objectives.two_chunk:TwoChunk",
        "multi_chunk": "mplus.training.objectives.full_memory:MultiChunk",
        "single_context": "mplus.training.objectives.full_memory:SingleContext",
        "revisit": "mplus.training.objectives.full_memory:Revisit",
        "repeat": "mplus.training.objectives.full_memory:Repeat",
        "window": "mplus.training.objectives.window:Window",
    },
)

__getattr__, __dir__ = lazy_exports(
    "mplus.training.objectives",
    {
        "mplus.config": ("flag", "must_be", "number", "one_of", "options_of", "whole"),
        "mplus.mechanisms.streams": ("TrainingStreams",),
        "mplus.training.batch": ("Batch",),
        "mplus.training.decoder": ("TrainedDecoder",),
        "mplus.training.objectives.base": ("Objective", "ObjectiveResult"),
        "mplus.training.objectives.full_memory": ("full_read",),
        "mplus.training.objectives.losses": ("RetrieverLoss", "accuracy", "token_loss"),
    },
)
