"""Front: the rows that stand in front of a text, turned to the positions they have there."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cached_property

import torch
from attrs import define, field
from torch import Tensor, nn

from mplus.backends.base import Segment
from mplus.backends.checks import check_finite
from mplus.mechanisms.decoder import KeptProjection, Tables
from mplus.mechanisms.opened import Insertion
from mplus.memory.state import StreamView


@define(frozen=True, eq=False)
class Front:
    """``[begin | chunks]`` of every stream, at consecutive positions.

    Attributes:
        kept: turns rows into segments.
        views: the streams.
        places: per stream ``[n_i]`` int64, which of its rows, in that order.
        begins: per stream ``[L, b_i, w]``, the keys and values of the tokens that begin its text; without any, nothing
            stands in front of its rows.
        insertion: where in the text they stand.
        tables: what rotates keys, by the kind of layer; filled as layers ask.
    """

    kept: KeptProjection
    views: Sequence[StreamView]
    places: Sequence[Tensor]
    begins: Sequence[Tensor]
    insertion: Insertion
    tables: dict[tuple[Hashable, torch.dtype, torch.device], Tables | None] = field(factory=dict)

    @staticmethod
    def before_text(
        kept: KeptProjection, views: Sequence[StreamView], places: Sequence[Tensor], begins: Sequence[Tensor]
    ) -> Front:
        """Return what stands in front of all of a text."""
        rows = torch.tensor([[begin.shape[1] + len(own)] for begin, own in zip(begins, places, strict=True)])
        return Front(kept, views, places, begins, Insertion(torch.zeros_like(rows), rows))

    def segments(self, layer: int, hidden: Tensor) -> tuple[Segment, ...]:
        """Return what a layer sees; () where no stream has anything.

        Args:
            layer: index among the layers that carry memory.
            hidden: ``[B, T, d]``, the text, which gives dtype and device.
        """
        most = max(self._counts)
        if not most:
            return ()
        streams = [self._rows(layer, stream, hidden) for stream in range(len(self.views))]
        parts = [one if len(one) == most else nn.functional.pad(one, (0, 0, 0, most - len(one))) for one in streams]
        rows = parts[0][None] if len(parts) == 1 else torch.stack(parts)
        segment = self.kept.turned(layer, [rows], self._tables(layer, hidden))
        if min(self._counts) == most:
            return (segment,)
        return (Segment(segment.keys, segment.values, self.insertion.counts.to(hidden.device)),)

    @cached_property
    def _counts(self) -> list[int]:
        """Rows in front of each stream's text: the same in all layers."""
        found: list[int] = self.insertion.counts.tolist()
        return found

    def _rows(self, layer: int, stream: int, hidden: Tensor) -> Tensor:
        """Return ``[P_i, w]``, the rows of one stream as they are kept."""
        parts = [self.begins[stream][layer].to(hidden)] if self.begins[stream].shape[1] else []
        places = self.places[stream]
        if len(places):
            parts.append(rows_of(self.views[stream], layer, places).to(hidden))
        if not parts:
            return hidden.new_empty(0, self.kept.size)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _tables(self, layer: int, hidden: Tensor) -> Tables | None:
        key = (self.kept.table_key(layer), hidden.dtype, hidden.device)
        if key not in self.tables:
            self.tables[key] = self.kept.tables(layer, hidden, self.insertion.positions.to(hidden.device))
        return self.tables[key]


def rows_of(view: StreamView, layer: int, places: Tensor) -> Tensor:
    """Return ``[n, w]``, the keys and values of a stream's tokens at ``places`` ``[n]`` int64, as they are kept."""
    together = view.store.content(layer, "projected")
    rows = (
        _looked_for(view, layer, places) if together is None else together.index_select(0, places.to(together.device))
    )
    check_finite("keys and values of a memory", rows)  # the begin was looked at when it was made or read
    return rows


def _looked_for(view: StreamView, layer: int, places: Tensor) -> Tensor:
    """Return the rows of a store in which they do not lie as one tensor."""
    ids = view.store.ids(layer)
    ids = ids[places.to(ids.device)]
    found = view.store.locate(layer, "projected", ids)
    if found is None:
        return view.store.gather(layer, ids, leave_out=("key", "expiry")).columns()["projected"]
    column, where = found.contiguous()
    return column.index_select(0, where)
