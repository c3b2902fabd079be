"""Training a decoder to use its memory: what is written and read in a step, which losses, in which order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["TrainingResult", "train"]

if TYPE_CHECKING:
    from mplus.training.run import TrainingResult, train


def __getattr__(name: str) -> Any:
    if name in __all__:
        from mplus.training import run as running

        return getattr(running, name)
    raise AttributeError(f"module 'mplus.training' has no attribute {name!r}")
