"""A mechanism that shares nothing with M+: one mean row per chunk, and what the last chunk began with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from attrs import define, evolve

from mplus.mechanisms.base import MemoryMechanism
from mplus.mechanisms.decoder import Attended, Decoder, Project, Text, side_by_side
from mplus.mechanisms.opened import Opened
from mplus.mechanisms.root import Absorbed, Columns
from mplus.memory.state import StreamState
from mplus.memory.writing.update import Update
from mplus.rows import MemoryRows

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from mplus.backends.base import Segment
    from mplus.memory.state import StreamView
    from mplus.memory.writing.update import WriteContext
    from mplus.stores.base import StoreLayout

KEPT = 3
"""Means beside the store."""


@define(frozen=True, eq=False, kw_only=True)
class GistState(StreamState):
    """The newest means of each layer, the first rows of the last chunk, and the source these are of."""

    lists: ClassVar[Mapping[str, str]] = {"gists": "gist"}

    gists: tuple[MemoryRows, ...]
    last: Tensor
    last_source: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return {"last": self.last, "last_source": self.last_source}

    def forgotten(self, number: int) -> Self:
        if int(self.last_source) != number:
            return self
        return evolve(self, last=self.last[:0].clone(), last_source=torch.tensor(-1))


class GistMechanism(MemoryMechanism):
    """Keeps the newest means, and moves older ones into the store."""

    name = "gists"
    State = GistState
    isolated_sources = True

    def new_state(self, layout: StoreLayout, columns: Columns | None = None) -> GistState:
        none = MemoryRows.empty(layout.hidden_size, dtype=layout.dtype, device=layout.device)
        last = torch.empty(0, layout.hidden_size, dtype=layout.dtype)
        return GistState(gists=(none,) * layout.layers, last=last, last_source=torch.tensor(-1))

    def write(self, decoder: Decoder, views: Sequence[StreamView], text: Text) -> Update:
        return Update(decoder.run(text.ids, collect={"outputs"}).outputs)

    def absorb(self, state: GistState, update: Update, source: int, context: WriteContext) -> Absorbed:
        block = update.hidden
        born, of = torch.tensor([state.clock]), torch.tensor([source])
        gists, stayed, leaving = [], [], 0
        for layer, (old, hidden) in enumerate(zip(state.gists, block, strict=True)):
            leaving = max(len(old) + 1 - KEPT, 0)
            if leaving:
                context.store.append(layer, old.select(torch.arange(leaving)))
            stay = torch.arange(leaving, len(old))
            gists.append(MemoryRows.cat([old.select(stay), MemoryRows(hidden.mean(0, keepdim=True), born, of)]))
            stayed.append(stay)
        after = evolve(
            state,
            gists=tuple(gists),
            last=block[0][:2].clone(),
            last_source=torch.tensor(source),
            clock=state.clock + 1,
        )
        return Absorbed(after, leaving, max(context.evict()), {"gists": tuple(stayed)})

    def capacity(self, rows: int) -> int:
        """A row is the mean of a chunk."""
        return rows * self.config.chunk_tokens

    def prefix(
        self, opened: Opened, layer: int, found: Sequence[Any], hidden: Tensor, project: Project
    ) -> tuple[Segment, ...] | Attended:
        lists = [view.state.row_lists()["gists"][layer].need_hidden().to(hidden) for view in opened.views]
        return (project(side_by_side(lists)),)

    def prefix_rows(self, view: StreamView) -> int:
        return max(map(len, view.state.row_lists()["gists"]))
