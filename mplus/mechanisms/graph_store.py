"""GraphStore: a store whose rows keep the graph of the pass that made them, for training."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar, TypedDict

import torch
from attrs import evolve
from torch import Tensor

from mplus.rows import MemoryRows
from mplus.stores.base import Column, Content, MemoryStore, StoreLayout, StoreView


class GraphView(StoreView):
    """Rows of every layer with their ids; nothing is ever changed in place.

    Attributes:
        rows: per layer, oldest id first.
        row_ids: per layer ``[m]`` int64, ascending.
    """

    def __init__(self, layout: StoreLayout, rows: Sequence[MemoryRows], row_ids: Sequence[Tensor]) -> None:
        self.layout = layout
        self.rows, self.row_ids = tuple(rows), tuple(row_ids)

    def ids(self, layer: int) -> Tensor:
        return self.row_ids[layer]

    def column(self, layer: int, name: Column) -> Tensor | None:
        return self.rows[layer].columns().get(name)

    def content(self, layer: int, name: Content) -> Tensor | None:
        return self.rows[layer].columns().get(name)

    def gather(self, layer: int, ids: Tensor, leave_out: Collection[Column | Content] = ()) -> MemoryRows:
        return self.rows[layer].select(self.places(layer, ids))

    def places(self, layer: int, ids: Tensor) -> Tensor:
        """Return the positions ``[n]`` int64 of rows by id. Raises KeyError, naming one, when an id is not there."""
        own, ids = self.row_ids[layer], ids.to(self.row_ids[layer].device)
        places = torch.searchsorted(own, ids)
        missing = places >= len(own)
        if len(own):
            missing = missing | (own[places.clamp(max=len(own) - 1)] != ids)
        if bool(missing.any()):
            raise KeyError(int(ids[missing][0]))
        return places


class GraphStoreState(TypedDict):
    """A ``GraphStore`` as tensors and plain data: of each layer its rows, their ids, and the id that comes next."""

    rows: list[dict[str, Tensor]]
    ids: list[Tensor]
    next: list[int]


class GraphStore(GraphView, MemoryStore):
    """Long-term rows of one stream in training: appended by joining tensors, so that gradients flow through them.

    Every change copies a layer: it is for memories of a training, not of a user.
    """

    name: ClassVar[str] = "graph"

    def __init__(self, layout: StoreLayout, options: MemoryStore.Options | None = None) -> None:
        MemoryStore.__init__(self, layout, options)
        empty = MemoryRows.of(
            {
                name: torch.empty(0, *shape, dtype=dtype, device=layout.device)
                for name, (shape, dtype) in layout.columns().items()
            }
        )
        self.rows = (empty,) * layout.layers
        self.row_ids = (torch.empty(0, dtype=torch.int64, device=layout.device),) * layout.layers
        self._next = [0] * layout.layers

    def append(self, layer: int, rows: MemoryRows) -> Tensor:
        rows = rows.to(self.layout.device)
        self.layout.check(rows)
        begin = self._next[layer]
        ids = torch.arange(begin, begin + len(rows), device=self.layout.device)
        self._set(layer, MemoryRows.cat([self.rows[layer], rows]), torch.cat([self.row_ids[layer], ids]))
        self._next[layer] += len(rows)
        return ids

    def remove(self, layer: int, ids: Tensor) -> None:
        stay = torch.ones(len(self.row_ids[layer]), dtype=torch.bool, device=self.layout.device)
        stay[self.places(layer, ids)] = False
        self._set(layer, self.rows[layer].select(stay), self.row_ids[layer][stay])

    def detach(self) -> None:
        """Cut all rows off from the passes that made them."""
        self.rows = tuple(detached(rows) for rows in self.rows)

    def snapshot(self) -> GraphView:
        view = GraphView(self.layout, self.rows, self.row_ids)
        view.identity = self.identity
        return view

    def restore(self, snapshot: StoreView) -> None:
        assert isinstance(snapshot, GraphView)  # noqa: S101  (taken from this store)
        self.rows, self.row_ids = snapshot.rows, snapshot.row_ids

    def fork(self) -> GraphStore:
        twin = GraphStore(self.layout, self.options)
        twin.rows, twin.row_ids, twin._next = self.rows, self.row_ids, list(self._next)
        return twin

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> MemoryStore:
        layout = evolve(
            self.layout, device=torch.device(device or self.layout.device), dtype=dtype or self.layout.dtype
        )
        moved = GraphStore(layout, self.options)
        moved.rows = tuple(rows.to(layout.device, layout.dtype) for rows in self.rows)
        moved.row_ids, moved._next = tuple(ids.to(layout.device) for ids in self.row_ids), list(self._next)
        return moved

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in self.rows) + sum(ids.nbytes for ids in self.row_ids)

    def state_dict(self) -> GraphStoreState:
        """Return rows, ids and the next id of each layer as tensors and plain data."""
        rows = [{name: column.detach() for name, column in part.columns().items()} for part in self.rows]
        return {"rows": rows, "ids": list(self.row_ids), "next": list(self._next)}

    def load_state_dict(self, state: GraphStoreState) -> None:
        """Take the rows of a saved state instead of the present ones."""
        device = self.layout.device
        self.rows = tuple(MemoryRows.of(part).to(device) for part in state["rows"])
        self.row_ids = tuple(ids.to(device) for ids in state["ids"])
        self._next = list(state["next"])

    def _set(self, layer: int, rows: MemoryRows, ids: Tensor) -> None:
        self.rows = (*self.rows[:layer], rows, *self.rows[layer + 1 :])
        self.row_ids = (*self.row_ids[:layer], ids, *self.row_ids[layer + 1 :])


def detached(rows: MemoryRows) -> MemoryRows:
    """Return rows without their graph."""
    return MemoryRows.of({name: column.detach() for name, column in rows.columns().items()})
