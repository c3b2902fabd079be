"""The generation that a thread is in: forwards of its model read what it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from typing import ParamSpec, TypeVar

from attrs import define
from torch import nn

from mplus.hf.reading.reading import Reading

P = ParamSpec("P")
T = TypeVar("T")


@define(frozen=True, eq=False)
class Generation:
    """One generation.

    Attributes:
        model: the wrapped decoder.
        reading: what its forwards read; None: the decoder alone.
    """

    model: nn.Module
    reading: Reading | None


_GENERATING: ContextVar[Generation | None] = ContextVar("mplus_generating", default=None)
"""The generation this thread is in: inner forwards use it, other models do not see it."""


def generation_of(model: nn.Module) -> Generation | None:
    """Return the generation of ``model`` that this thread is in, or None."""
    generation = _GENERATING.get()
    return generation if generation is not None and generation.model is model else None


def is_generating(model: nn.Module) -> bool:
    """Return whether this thread is in a generation of ``model``."""
    return generation_of(model) is not None


@contextmanager
def generating(model: nn.Module, reading: Reading) -> Iterator[None]:
    """Let forwards of ``model`` in this thread read ``reading``; where nobody interrupts, see ``generate_in``."""
    token = _GENERATING.set(Generation(model, reading))
    try:
        yield
    finally:
        _GENERATING.reset(token)


def generate_in(
    model: nn.Module, reading: Reading | None, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> T:
    """Return ``function(*args, **kwargs)``, in which forwards of ``model`` read ``reading``; see ``run_in``.

    Args:
        model: the wrapped decoder.
        reading: None: the decoder alone.
        function, args, kwargs: the call.
    """
    context = copy_context()
    context.run(_GENERATING.set, Generation(model, reading))
    return context.run(function, *args, **kwargs)
