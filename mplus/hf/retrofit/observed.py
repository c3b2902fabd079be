"""Decoder layers seen from outside: an observer stands around the attention of each layer that is run under it."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar, copy_context
from typing import ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
P = ParamSpec("P")
Weighted = tuple[Tensor, Tensor | None]
"""Results of attention: output ``[B, T, H, Dv]``, and weights ``[B, H, T, S]`` where the function makes them."""


class AttentionObserver(Protocol):
    """Stands around what one decoder layer does with all tokens of a text at once."""

    def prefix(self, make: Callable[[], T]) -> T | None:
        """Return the memory that ``make`` makes for the layer's attention, or None in its place."""

    def attend(self, attend: Callable[[], Weighted], query: Tensor, key: Tensor, value: Tensor) -> Weighted:
        """Return the attention that ``attend`` computes of the text ``[B, H or Hkv, T, D]``, or one in its place."""


_CURRENT: ContextVar[AttentionObserver | None] = ContextVar("mplus_attention_observer", default=None)


def current_observer() -> AttentionObserver | None:
    """Return the observer that this thread runs a layer under, if any."""
    return None if torch.compiler.is_compiling() else _CURRENT.get()


def observed_by(observer: AttentionObserver | None, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call ``function(*args, **kwargs)`` under an observer, in a copy of the thread's context (see ``run_in``)."""
    context = copy_context()
    context.run(_CURRENT.set, observer)
    return context.run(function, *args, **kwargs)
