"""MemoryMechanism: what is written when a chunk is read, and which rows each layer sees when text is read."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from attrs import define, evolve
from torch import Tensor

from mplus.config import MPlusConfig
from mplus.errors import InputError
from mplus.eviction.base import EvictionPolicy
from mplus.mechanisms.additions import MemoryAdditions
from mplus.memory.state import StreamState, StreamView
from mplus.memory.writing.context import WriteContext
from mplus.rows import NO_SOURCE, MemoryRows
from mplus.stores.base import Located, MemoryStore, StoreLayout, StoreView

logger = logging.getLogger(__name__)


@define(frozen=True, eq=False)
class WritePlan:
    """Which memory rows a write pass reads.

    Attributes:
        begin: put the begin row in front.
        context: per layer, the newest rows to read, oldest first; as many in every layer.
        reencoded: how many of the newest context rows are queries too (chunk shorter than K).
        rows: how many new rows the pass makes.
        overlap: layers hand on their new rows with the next layer's mark already added (published MemoryLLM only).
    """

    begin: bool
    context: tuple[MemoryRows, ...]
    reencoded: int
    rows: int
    overlap: bool = False


@define(frozen=True, eq=False)
class Retrieved:
    """Long-term rows a read brings back in one layer for one batch row, oldest first.

    Attributes:
        rows: the rows themselves.
        ids: ``[n]`` int64, their ids in the view they were picked from.
        scores: ``[n]`` float32; empty where nothing was scored.
        source: where ``rows`` lack ``projected``: where that lies in the view.
    """

    rows: MemoryRows
    ids: Tensor
    scores: Tensor
    source: Located | None = None


@define(frozen=True)
class Absorbed:
    """What a write did to a stream.

    Attributes:
        state: the new one.
        dropped, evicted: rows that left the STM and the LTM.
        stayed: per layer, places of the short-term rows that stayed, in order; in ``state.stm`` they come first. None:
            not known; a memory in a directory then writes down all of them.
    """

    state: StreamState
    dropped: int
    evicted: int
    stayed: tuple[Tensor, ...] | None = None


class MemoryMechanism(ABC):
    """The rules of one memory. Holds no state of any memory; built as ``Mechanism(config, additions, options)``."""

    @define(frozen=True, kw_only=True)
    class Options:
        """Options of the mechanism (attrs class; the base class has none)."""

        @classmethod
        def defaults(cls, variant: str) -> dict[str, Any]:
            """Option values that differ from the class's own in this variant."""
            return {}

    name: ClassVar[str]
    uses_retriever: ClassVar[bool] = True

    def __init__(self, config: MPlusConfig, additions: MemoryAdditions, options: Any) -> None:
        self.config = config
        self.additions = additions
        self.options = options

    @property
    def expiry(self) -> bool:
        """Whether long-term rows carry an expiry."""
        return False

    @property
    def long_term(self) -> bool:
        """Whether there is a long-term memory at all."""
        return self.uses_retriever and self.config.long_term_tokens != 0

    def lifetime(self, eviction: EvictionPolicy) -> float | None:
        """Merges that new long-term rows of a memory under ``eviction`` live; None: they do not expire."""
        return None

    @property
    def waiting_rows(self) -> int:
        """The most rows that wait in a layer, between two merges, to get into long-term memory."""
        return 0

    @property
    def key_size(self) -> int:
        """Width of retriever keys; 0 where none are kept."""
        return self.additions.retriever.key_size if self.uses_retriever and self.additions.retriever is not None else 0

    def new_state(self, layout: StoreLayout) -> StreamState:
        """A fresh stream: the checkpoint's pool if it has one, else empty."""
        empty = tuple(self._empty(layout) for _ in range(layout.layers))
        pool = self.additions.pool
        if pool is None:
            hidden = torch.empty(0, layout.hidden_size, dtype=layout.dtype, device=layout.device)
            newest = () if layout.keeps_hidden else (hidden,) * layout.layers
            return StreamState(stm=empty, pending=empty, newest=newest)
        n = pool.shape[1]
        births = torch.arange(n, dtype=torch.int64, device=layout.device)
        source = torch.full((n,), NO_SOURCE, dtype=torch.int64, device=layout.device)
        stm = tuple(MemoryRows(rows.to(layout.device, layout.dtype), births, source) for rows in pool.detach())
        return StreamState(stm=stm, pending=empty, clock=n)

    def _empty(self, layout: StoreLayout) -> MemoryRows:
        """Short-term rows have a key from the start only where it cannot be made later, when they leave."""
        return MemoryRows.empty(
            layout.hidden_size if layout.keeps_hidden else 0,
            key_size=0 if layout.keeps_hidden else layout.key_size,
            projected_size=layout.projected_size,
            dtype=layout.dtype,
            device=layout.device,
        )

    def plan_write(self, state: StreamState, tokens: int, reencode: bool = True) -> WritePlan:
        """Rows read and made by writing a chunk of ``tokens`` text tokens (published: newest K rows of the STM).

        ``reencode`` False: a chunk shorter than K makes only as many rows as it has tokens.
        """
        k = self.config.memory_tokens_per_chunk
        kept = (hidden.shape[0] for hidden in state.newest)
        present = min(k, *(len(rows) for rows in state.stm), *kept)
        context = tuple(state.context(layer, present) for layer in range(len(state.stm)))
        reencoded = min(max(k - tokens, 0), present) if reencode else 0
        return WritePlan(begin=True, context=context, reencoded=reencoded, rows=min(k, tokens + reencoded))

    def absorb(self, state: StreamState, block: Sequence[Tensor], source: int, context: WriteContext) -> Absorbed:
        """Take the new rows ``block`` (per layer ``[k, d]``), written from ``source``, into a stream."""
        k = block[0].shape[0]
        stm, dropped, newest, stayed = [], [], [], []
        permutation: Tensor | None = None
        for layer, (old, hidden) in enumerate(zip(state.stm, block, strict=True)):
            excess = max(len(old) + k - self.config.short_term_tokens, 0)
            if excess and (permutation is None or self.config.drop_per_layer or len(permutation) != len(old)):
                permutation = context.draw(len(old))
            stay, leave = _places(len(old), excess, permutation, old.birth.device)
            new = self._new_rows(layer, hidden, source, state, old, context)
            stm.append(MemoryRows.cat([old.select(stay), new]))  # a copy: the block is a view of all the pass computed
            dropped.append(old.select(leave))
            stayed.append(stay)
            if state.newest:
                own = torch.cat([state.kept(layer, stay), hidden.to(state.newest[layer])])
                newest.append(own[max(own.shape[0] - self.config.memory_tokens_per_chunk, 0) :].clone())
        moved = evolve(state, stm=tuple(stm), newest=tuple(newest), clock=state.clock + k)
        moved, evicted = self.keep_dropped(moved, dropped, context)
        return Absorbed(moved, max(len(rows) for rows in dropped), evicted, tuple(stayed))

    def _new_rows(
        self, layer: int, hidden: Tensor, source: int, state: StreamState, like: MemoryRows, context: WriteContext
    ) -> MemoryRows:
        """Rows ``hidden`` ``[k, d]`` with the columns of the short-term rows ``like``."""
        k, device = hidden.shape[0], like.birth.device
        rows = MemoryRows(
            hidden=None if like.hidden is None else hidden.to(like.hidden),
            birth=self._births(state, k).to(device),
            source=torch.full((k,), source, dtype=torch.int64, device=device),
        )
        if like.projected is not None:
            rows = rows.replace(projected=context.projected[layer].to(like.projected))
        if like.key is not None:
            key = context.keys(layer, hidden)
            rows = rows.replace(key=None if key is None else key.to(like.key))
        return rows

    def short_term_births(self, state: StreamState, layer: int) -> Tensor:
        """``[n]`` int64: births of the short-term rows of a layer, by which their age is ``clock - 1 - birth``."""
        return state.stm[layer].birth

    def _births(self, state: StreamState, k: int) -> Tensor:
        return torch.arange(state.clock, state.clock + k, dtype=torch.int64)

    def follow(self, store: MemoryStore) -> None:
        """Rows were removed from ``store`` for good: let go of what a retriever keeps of them."""
        if self.uses_retriever and self.additions.retriever is not None:
            self.additions.retriever.follow(store)

    def index_tensors(self, store: StoreView) -> list[dict[str, Tensor]]:
        """Per layer, what the retriever's index of these rows can be made of again; {} where there is none."""
        retriever = self.additions.retriever if self.uses_retriever else None
        layers = range(store.layout.layers)
        return [{} if retriever is None else retriever.index_tensors(layer, store) for layer in layers]

    def adopt_index(self, store: StoreView, tensors: Sequence[Mapping[str, Tensor]]) -> None:
        """Let the retriever take over what ``index_tensors`` gave for these rows, or make its index anew."""
        retriever = self.additions.retriever if self.uses_retriever else None
        for layer, found in enumerate(tensors):
            if retriever is not None and found:
                try:
                    retriever.adopt_index(layer, store, found)
                except InputError as error:
                    logger.info("the saved index of layer %d is not used, a new one will be made: %s", layer, error)

    @abstractmethod
    def keep_dropped(
        self, state: StreamState, dropped: Sequence[MemoryRows], context: WriteContext
    ) -> tuple[StreamState, int]:
        """Where rows go that left the STM. Returns the new state and the rows evicted per layer."""

    def retrieve(self, layer: int, hidden: Tensor, mask: Tensor, views: Sequence[StreamView]) -> list[Retrieved | None]:
        """Long-term rows for each batch row, oldest first; None where there is no long-term memory.

        Args:
            layer: index among the layers that carry memory.
            hidden: ``[B, T, d]`` text after the layer's input norm.
            mask: ``[B, T]`` bool, False at padding.
            views: one per batch row.
        """
        return [None] * len(views)

    def has_prefix(self, view: StreamView) -> bool:
        """Whether a read puts anything in front of the text (the begin row, at least)."""
        return True

    def prefix_rows(self, view: StreamView) -> int:
        """Rows a read puts in front of the text, in the layer that has most."""
        if not self.has_prefix(view):
            return 0
        return max(1 + self.retrieved_rows(view, layer) + len(rows) for layer, rows in enumerate(view.state.stm))

    def retrieved_rows(self, view: StreamView, layer: int) -> int:
        """Rows that ``retrieve`` brings back in one layer."""
        return 0


def _places(count: int, excess: int, permutation: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Places that stay and ``excess`` that leave, both in order (uniform random drop: MemoryLLM section 3.1.2)."""
    if not excess or permutation is None:
        return torch.arange(count, device=device), torch.arange(0, device=device)
    stay, leave = permutation[: count - excess], permutation[count - excess :]
    return stay.sort().values.to(device), leave.sort().values.to(device)
