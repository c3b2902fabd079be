"""A mechanism whose memory stands in the middle of a text, and decoders that read it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from attrs import evolve

from mplus.mechanisms.base import Absorbed, MemoryMechanism
from mplus.mechanisms.decoder import side_by_side
from mplus.mechanisms.opened import Insertion, Opened
from mplus.memory.state import StreamState
from mplus.memory.writing.update import Update
from mplus.rows import MemoryRows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from mplus.backends.base import Segment
    from mplus.mechanisms.decoder import Decoder, Project, Text
    from mplus.memory.state import StreamView


class NoState(StreamState):
    def row_lists(self) -> dict[str, Any]:
        return {}

    def with_rows(self, rows: Any) -> NoState:
        return self


class Middle(MemoryMechanism):
    """Keeps what the layers received for ``[begin | told]``, and puts that of ``told`` behind the begin of a prompt.

    Attributes:
        begins: tokens of the begin, for each stream that reads; where these are others, one token each.
    """

    name, State, uses_retriever, keeps = "middle", NoState, False, frozenset({"hidden"})  # type: ignore[assignment]
    begins: ClassVar[list[int]] = []

    def new_state(self, layout: Any, columns: Any = None) -> NoState:
        return NoState()

    def write(self, decoder: Decoder, views: Sequence[StreamView], text: Text) -> Update:
        return Update(decoder.run(text.need_ids(), collect={"inputs"}).inputs)

    def absorb(self, state: Any, update: Update, source: int, context: Any) -> Absorbed:
        births = torch.arange(state.clock, state.clock + update.hidden[0].shape[0])
        for layer, hidden in enumerate(update.hidden):
            context.store.append(layer, MemoryRows(hidden, births, torch.full_like(births, source)))
        return Absorbed(evolve(state, clock=state.clock + len(births)), 0, 0)

    def open(self, decoder: Decoder, views: Sequence[StreamView], text: Text) -> Opened:
        begins = self.begins if len(self.begins) == len(views) else [1] * len(views)
        counts = [max(view.store.count(0) - begin, 0) for view, begin in zip(views, begins, strict=True)]
        insertion = Insertion(torch.tensor(begins)[:, None], torch.tensor(counts)[:, None])
        return Opened(views, own=begins, insertion=insertion if any(counts) else None)

    def prefix(
        self, opened: Opened, layer: int, found: Any, hidden: Tensor, project: Project
    ) -> tuple[Segment, ...] | None:
        if opened.insertion is None:
            return None
        stores = [view.store for view in opened.views]
        kept = [store.gather(layer, store.ids(layer)).need_hidden() for store in stores]
        return (project(side_by_side([rows[begin:] for rows, begin in zip(kept, opened.own, strict=True)])),)

    def prefix_rows(self, view: StreamView) -> int:
        return view.store.count(0)
