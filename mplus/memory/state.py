"""The state of one stream: one batch row of a memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from attrs import define, evolve, field
from torch import Tensor

from mplus.errors import MemoryMismatchError
from mplus.memory.format.rules import check_columns, check_newest
from mplus.memory.sources.table import SourceTable
from mplus.memory.texts import Text, Texts, Waiting
from mplus.memory.weights_state import WeightsState
from mplus.rows import MemoryRows
from mplus.stores.access_log import Usage
from mplus.stores.base import StoreLayout, StoreView

ROW_LISTS = ("stm", "pending")
"""Names of the lists of rows that ``StreamState`` keeps, each with a part for every layer."""


@define(frozen=True, eq=False, kw_only=True)
class StreamState:
    """Everything a stream remembers besides its store. Immutable: a write makes a new one.

    Which rows and tensors the mechanism keeps is known here alone: files have them by the names that ``row_lists`` and
    ``tensors`` give, and ``from_parts`` takes them back.

    Attributes:
        stm: short-term rows of each layer, oldest first (layers differ in length only after ``forget``).
        pending: rows of each layer that left the STM and wait for the next merge; empty where there is no waiting.
        clock: rows written so far per layer; the next birth index.
        sources: what was written, by source number.
        newest: per layer ``[c, d]``, hidden states of the newest short-term rows (K of them, where there are as many),
            which the next write reads; empty where the rows keep theirs.
        counters: the mechanism's own numbers, each a small tensor.
        texts: what was written, where the memory keeps that; else None.
        tail: text that waits for more, to make up a chunk.
        weights: what keys and values, and retriever keys, were computed with; None where nobody knows.
    """

    stm: tuple[MemoryRows, ...]
    pending: tuple[MemoryRows, ...]
    clock: int = 0
    sources: SourceTable = field(factory=SourceTable)
    newest: tuple[Tensor, ...] = ()
    counters: dict[str, Tensor] = field(factory=dict)
    texts: Texts | None = None
    tail: tuple[Waiting, ...] = ()
    weights: WeightsState | None = None

    @staticmethod
    def from_parts(
        layout: StoreLayout, rows: Mapping[str, Sequence[MemoryRows]], tensors: Mapping[str, Tensor], **others: Any
    ) -> StreamState:
        """The state whose ``row_lists`` and ``tensors`` these are.

        Args:
            layout: of the rows.
            rows: by name of the list.
            tensors: by name.
            others: the other attributes.

        Raises:
            MemoryMismatchError: a list or a tensor is missing, superfluous, or of another form than the layout's.
        """
        if rows.keys() != set(ROW_LISTS) or any(len(parts) != layout.layers for parts in rows.values()):
            found = {name: len(parts) for name, parts in rows.items()}
            raise MemoryMismatchError(
                f"a stream must have the lists of rows {', '.join(ROW_LISTS)} for {layout.layers} layers, got {found}"
            )
        newest = [f"newest.{layer}" for layer in range(0 if layout.keeps_hidden else layout.layers)]
        counters = {name: value for name, value in tensors.items() if name.startswith("counter.")}
        if set(newest) | counters.keys() != tensors.keys():
            raise MemoryMismatchError(
                f"a stream must have the tensors {newest} and counters, got {sorted(tensors.keys() - counters.keys())}"
            )
        for name, parts in rows.items():
            for layer, part in enumerate(parts):
                check_columns(part.columns(), evolve(layout, expiry=False), f"{name} of layer {layer}")
        for layer, name in enumerate(newest):
            check_newest(tensors[name], rows["stm"][layer], layout, layer)
        return StreamState(
            stm=tuple(rows["stm"]),
            pending=tuple(rows["pending"]),
            newest=tuple(tensors[name].to(layout.device) for name in newest),
            counters={name.removeprefix("counter."): value for name, value in counters.items()},
            **others,
        )

    def row_lists(self) -> dict[str, tuple[MemoryRows, ...]]:
        """All rows but the long-term ones, by the name of their list, with a part for every layer."""
        return {"stm": self.stm, "pending": self.pending}

    def tensors(self) -> dict[str, Tensor]:
        """All other tensors that belong to the mechanism, by name."""
        newest = {f"newest.{layer}": hidden for layer, hidden in enumerate(self.newest)}
        return {**newest, **{f"counter.{name}": value for name, value in self.counters.items()}}

    @property
    def nbytes(self) -> int:
        """Bytes of the short-term and pending rows."""
        return sum(rows.nbytes for rows in (*self.stm, *self.pending)) + sum(part.nbytes for part in self.newest)

    def context(self, layer: int, count: int) -> MemoryRows:
        """The newest ``count`` short-term rows of a layer, oldest first, with their hidden states."""
        rows = self.stm[layer]
        rows = rows.select(slice(len(rows) - count, None))
        if not self.newest:
            return rows
        hidden = self.newest[layer]
        return rows.replace(hidden=hidden[hidden.shape[0] - count :])

    def kept(self, layer: int, kept: Tensor) -> Tensor:
        """What is left of ``newest`` when of this layer's short-term rows those at ``kept`` (bool or places) stay."""
        hidden = self.newest[layer]
        places = kept.nonzero().squeeze(1) if kept.dtype == torch.bool else kept
        places = places - (len(self.stm[layer]) - hidden.shape[0])
        return hidden[places[places >= 0].to(hidden.device)]

    def with_source(self, name: str | None, tokens: int) -> tuple[StreamState, int]:
        """Count ``tokens`` of one chunk under ``name``; returns the new state and the source's number."""
        sources, number = self.sources.written(name, tokens)
        return evolve(self, sources=sources), number

    def without_source(self, number: int) -> StreamState:
        """This state without what came from one source, its name included."""
        return evolve(
            self,
            stm=tuple(rows.select(rows.source != number) for rows in self.stm),
            pending=tuple(rows.select(rows.source != number) for rows in self.pending),
            newest=tuple(self.kept(layer, rows.source != number) for layer, rows in enumerate(self.stm) if self.newest),
            texts=None if self.texts is None else self.texts.without(number),
            tail=tuple(part for part in self.tail if part.source != number),
            sources=self.sources.without([number]),
        )

    def with_text(self, ids: Tensor, source: int, turn: int) -> StreamState:
        """Keep the ids ``[n]`` of one chunk, where texts are kept."""
        if self.texts is None:
            return self
        text = Text(ids.to("cpu", torch.int32, copy=True), source, turn)
        return evolve(self, texts=self.texts.appended(text))


@define(frozen=True, eq=False)
class StreamView:
    """What a read sees of one stream: an immutable state and an immutable view of its store.

    Attributes:
        state: all but the long-term rows.
        store: these.
        usage: where the read notes what it retrieves, if the eviction policy goes by that.
    """

    state: StreamState
    store: StoreView
    usage: Usage | None = None


def alike(chunks: Sequence[Tensor], states: Sequence[StreamState]) -> list[list[int]]:
    """Places of those that can share one pass: same chunk length, same number of short-term rows in every layer."""
    groups: dict[Any, list[int]] = {}
    for place, (ids, state) in enumerate(zip(chunks, states, strict=True)):
        groups.setdefault((len(ids), tuple(len(rows) for rows in state.stm)), []).append(place)
    return list(groups.values())
