"""Training a decoder to use its memory: what is written and read in a step, which losses, in which order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mplus.registry import lazy_exports

__all__ = ["TrainingResult", "manage_activations", "train"]

if TYPE_CHECKING:
    from mplus.training.activations.managed import manage_activations
    from mplus.training.run import TrainingResult, train

__getattr__, __dir__ = lazy_exports(
    "mplus.training",
    {
        "mplus.training.activations.managed": ("manage_activations",),
        "mplus.training.run": ("TrainingResult", "train"),
    },
)
