"""The objectives a recipe composes, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mplus.registry import Registry

if TYPE_CHECKING:
    from mplus.training.objectives.base import Objective

__all__ = ["OBJECTIVES"]

OBJECTIVES: Registry[Objective] = Registry(
    "objective",
    group="mplus.objectives",
    base="mplus.training.objectives.base:Objective",
    builtin={
        "plain_lm": "mplus.training.objectives.plain_lm:PlainLM",
        "two_chunk": "mplus.training.objectives.two_chunk:TwoChunk",
        "multi_chunk": "mplus.training.objectives.multi_chunk:MultiChunk",
        "single_context": "mplus.training.objectives.single_context:SingleContext",
        "revisit": "mplus.training.objectives.revisit:Revisit",
        "repeat": "mplus.training.objectives.single_context:Repeat",
        "window": "mplus.training.objectives.window:Window",
    },
)
