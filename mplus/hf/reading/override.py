"""Reading memories as if the decoder had been wrapped otherwise: to compare retrievers on the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Self, cast

from attrs import define, evolve
from torch import nn

from mplus.errors import NotSupported
from mplus.hf.model.engine import DecoderEngine
from mplus.mechanisms.base import MemoryMechanism
from mplus.retrievers.base import Retriever


class WrappedMechanism:
    """A mechanism in front of another one: what it does not define itself is the other's.

    Only calls from outside come by here: the other one calls its own methods.

    Example:
        >>> class Silent(WrappedMechanism):
        ...     def prefix(self, *given):  # nothing in front of the text, whatever the other one would put there
        ...         return None

    Attributes:
        inner: the other one.
    """

    def __init__(self, inner: MemoryMechanism) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def in_front_of(self, inner: MemoryMechanism) -> Self:
        """Return the same in front of another mechanism."""
        other = object.__new__(type(self))
        vars(other).update(vars(self), inner=inner)
        return other


@define(frozen=True, eq=False)
class _StandIn:
    """The mechanism that reads of the decoder behind ``engine`` go by inside one ``with`` block."""

    engine: DecoderEngine
    mechanism: MemoryMechanism


_STAND_INS: ContextVar[tuple[_StandIn, ...]] = ContextVar("mplus_reading_as", default=())
"""Of the blocks this context is in, of all models, outermost first."""


def mechanism_for_reads(engine: DecoderEngine) -> MemoryMechanism:
    """Return the mechanism that reads in this context go by: the decoder's own, or that of a ``reading_as`` block."""
    return next((one.mechanism for one in reversed(_STAND_INS.get()) if one.engine is engine), engine.mechanism)


@contextmanager
def reading_as(
    model: nn.Module,
    *,
    retriever: Retriever | None = None,
    retrieved_tokens: int | None = None,
    query_tokens: int | None = None,
    around: Callable[[MemoryMechanism], WrappedMechanism] | None = None,
) -> Iterator[None]:
    """Let reads of ``model`` inside the ``with`` block go by other settings.

    They do so in the context (``contextvars``) that enters the block: other threads read as always. Writes go by the
    decoder's own settings, inside the block too. Blocks may be nested: the inner one changes what the outer one says.

    Args:
        model: a wrapped decoder.
        retriever: brings rows back in place of the decoder's own; rows have the keys they were written with.
        retrieved_tokens: K0; 0 reads short-term memory only, as MemoryLLM does.
        query_tokens: retrieve with so many tokens of the text only; None: as configured.
        around: puts another one in front of the mechanism, whichever that is.

    Raises:
        NotSupported: there is a ``retriever``, and the decoder's mechanism has none that it could replace.
    """
    engine = cast("DecoderEngine", model.mplus_engine)
    before = mechanism_for_reads(engine)
    if retriever is not None and not before.uses_retriever:
        raise NotSupported(f"the mechanism {before.name!r} has no retriever that another one could stand in for")
    entered = _StandIn(engine, _changed(before, retriever, retrieved_tokens, query_tokens))
    if around is not None:
        entered = _StandIn(engine, cast("MemoryMechanism", around(entered.mechanism)))
    try:
        try:
            _STAND_INS.set((*_STAND_INS.get(), entered))
            yield
        finally:
            _leave(entered)
    finally:
        _leave(entered)  # once more, for an interrupt may have struck the first time


def _changed(
    before: MemoryMechanism, retriever: Retriever | None, retrieved_tokens: int | None, query_tokens: int | None
) -> MemoryMechanism:
    """Return a mechanism like ``before`` with other settings, or itself where all stay as they are."""
    if retriever is None and retrieved_tokens is None and query_tokens is None:
        return before
    if isinstance(before, WrappedMechanism):
        inner = _changed(before.inner, retriever, retrieved_tokens, query_tokens)
        return cast("MemoryMechanism", before.in_front_of(inner))
    config = before.config
    if retrieved_tokens is not None:
        config = evolve(config, retrieved_tokens=retrieved_tokens)
    if query_tokens is not None:
        config = evolve(config, query_tokens=query_tokens)
    changed = type(before)(config, before.additions, before.options)
    changed.retriever = before.retriever if retriever is None else retriever
    return changed


def _leave(entered: _StandIn) -> None:
    # Not by a token: blocks may be left in any order, and in other contexts, by generators.
    _STAND_INS.set(tuple(one for one in _STAND_INS.get() if one is not entered))
