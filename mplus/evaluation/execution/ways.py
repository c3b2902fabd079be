"""Ways of reading memories: with which retriever, and how many rows."""

from __future__ import annotations

from typing import Any

from attrs import define

from mplus.errors import MissingDependencyError, NotSupported, UnknownNameError
from mplus.evaluation.options import ArmOptions
from mplus.evaluation.retriever_swap import Recency, check_new_memories, retriever_for
from mplus.memory.memory import Memory
from mplus.retrievers.base import Retriever


@define(frozen=True, eq=False)
class Way:
    """A way of reading memory.

    Attributes:
        retriever: stands in for the decoder's own; None: the decoder's own.
        retrieved_tokens: K0; None: as configured; 0: short-term memory only (MemoryLLM).
        oracle: bring back the rows that were written from the passages with the answer.
    """

    retriever: Retriever | None = None
    retrieved_tokens: int | None = None
    oracle: bool = False


def find_way(model: Any, arm: str, options: ArmOptions) -> Way | str:
    """Return the way in which an arm reads memories of M+ or MemoryLLM, or the reason why it cannot."""
    mechanism = model.mplus_engine.mechanism
    retrieves = mechanism.uses_retriever and mechanism.config.long_term_tokens != 0
    if arm == "memoryllm":
        return Way(retrieved_tokens=0 if retrieves else None)
    if not retrieves:
        return "the decoder was wrapped without long-term memory"
    if arm == "mplus":
        return Way()
    if arm == "mplus-oracle":
        return Way(oracle=True)
    if arm == "mplus-recency":
        return Way(Recency(mechanism.retriever.shape))
    settings = {"seed": options.seed} if arm == "mplus-random" else {}
    try:
        retriever = retriever_for(model, arm.removeprefix("mplus-"), **settings)
        check_new_memories(model, retriever)
        return Way(retriever)
    except (NotSupported, UnknownNameError, MissingDependencyError) as error:
        return str(error)


def state_bytes(streams: Memory, row: int, way: Way) -> int:
    """Return the bytes of the rows that a stream keeps to be read this way."""
    view, store = streams.snapshot()[row], streams.stores[row]
    if way.retrieved_tokens == 0:  # what it never reads, it would not keep
        mechanism = streams.engine.mechanism
        standing = [mechanism.standing(view, layer) for layer in range(store.layout.layers)]
        return sum(rows.nbytes for rows in standing if rows is not None)
    lists = view.state.row_lists().values()
    return sum(rows.nbytes for parts in lists for rows in parts) + store.nbytes
