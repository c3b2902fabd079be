"""Reading memories as if the decoder had been wrapped otherwise: to compare retrievers on the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from attrs import define, evolve
from torch import Tensor

from mplus.errors import NotSupported
from mplus.hf.engine import DecoderEngine
from mplus.mechanisms.base import MemoryMechanism
from mplus.retrievers.base import Retriever


@define(frozen=True, eq=False)
class _Additions:
    """The additions of a decoder, but for the retriever."""

    begin: Tensor
    mark: Tensor
    pool: Tensor | None
    retriever: Retriever | None


@contextmanager
def reading_as(
    model: Any,
    *,
    retriever: Retriever | None = None,
    retrieved_tokens: int | None = None,
    query_tokens: int | None = None,
    make: Callable[[Any, Any, Any], MemoryMechanism] | None = None,
) -> Iterator[None]:
    """Meanwhile, reads of ``model`` (in every thread) go by other settings. Write nothing meanwhile.

    Args:
        model: a wrapped decoder.
        retriever: brings rows back in place of the decoder's own; rows have the keys they were written with.
        retrieved_tokens: K0; 0 reads short-term memory only, as MemoryLLM does.
        query_tokens: retrieve with so many tokens of the text only; None: as configured.
        make: makes the mechanism from config, additions and options; None: the decoder's own class.

    Raises:
        NotSupported: the decoder's mechanism retrieves nothing, so there is nothing to replace.
    """
    engine: DecoderEngine = model.mplus_engine
    before = engine.mechanism
    if not before.uses_retriever:
        raise NotSupported(f"the mechanism {before.name!r} has no retriever that another one could stand in for")
    config = before.config
    if retrieved_tokens is not None:
        config = evolve(config, retrieved_tokens=retrieved_tokens)
    if query_tokens is not None:
        config = evolve(config, query_tokens=query_tokens)
    own = before.additions
    additions = _Additions(own.begin, own.mark, own.pool, own.retriever if retriever is None else retriever)
    engine.mechanism = (make or type(before))(config, additions, before.options)  # type: ignore[arg-type]
    try:
        yield
    finally:
        engine.mechanism = before
