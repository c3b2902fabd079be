"""Reading memories as if the decoder had been wrapped otherwise: to compare retrievers on the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import cast

from attrs import define, evolve
from torch import nn

from mplus.errors import NotSupported
from mplus.hf.model.engine import DecoderEngine
from mplus.mechanisms.base import MemoryMechanism
from mplus.retrievers.base import Retriever


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
    make: Callable[..., MemoryMechanism] | None = None,
) -> Iterator[None]:
    """Let reads of ``model`` inside the ``with`` block go by other settings.

    They do so in the context (``contextvars``) that enters the block: other threads read as always. Writes go by the
    decoder's own settings, inside the block too. Blocks may be nested: the inner one changes what the outer one says.

    Args:
        model: a wrapped decoder.
        retriever: brings rows back in place of the decoder's own; rows have the keys they were written with.
        retrieved_tokens: K0; 0 reads short-term memory only, as MemoryLLM does.
        query_tokens: retrieve with so many tokens of the text only; None: as configured.
        make: makes the mechanism from config, additions and options; None: the decoder's own class.

    Raises:
        NotSupported: the decoder's mechanism retrieves nothing, so there is nothing to replace.
    """
    engine = cast("DecoderEngine", model.mplus_engine)
    before = mechanism_for_reads(engine)
    if not before.uses_retriever:
        raise NotSupported(f"the mechanism {before.name!r} has no retriever that another one could stand in for")
    config = before.config
    if retrieved_tokens is not None:
        config = evolve(config, retrieved_tokens=retrieved_tokens)
    if query_tokens is not None:
        config = evolve(config, query_tokens=query_tokens)
    mechanism = (make or type(before))(config, before.additions, before.options)
    mechanism.retriever = before.retriever if retriever is None else retriever
    entered = _StandIn(engine, mechanism)
    try:
        try:
            _STAND_INS.set((*_STAND_INS.get(), entered))
            yield
        finally:
            _leave(entered)
    finally:
        _leave(entered)  # once more, for an interrupt may have struck the first time


def _leave(entered: _StandIn) -> None:
    # Not by a token: blocks may be left in any order, and in other contexts, by generators.
    _STAND_INS.set(tuple(one for one in _STAND_INS.get() if one is not entered))
