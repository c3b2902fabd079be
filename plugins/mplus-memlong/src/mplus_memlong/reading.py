"""ReadGroups: what one text reads of its memories, as keys and values of the layers that read; and the gate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from attrs import define, evolve, field
from torch import Tensor, nn

from mplus.backends.base import AttentionRequest, AttentionResult, Segment
from mplus.backends.checks import check_finite
from mplus.mechanisms.decoder import Compute, KeptProjection, Tables
from mplus.memory.state import StreamView
from mplus_memlong.state import state_of

Positions = Literal["zero", "continual", "cumulative"]


@define(frozen=True, eq=False)
class Chosen:
    """The groups that one text reads of its stream.

    Attributes:
        groups: ``[k]`` int64, places in the table, the oldest first.
        scores: ``[k]`` float32.
        query: ``[v]``, what they were chosen by; of no width where the stream is empty.
    """

    groups: Tensor
    scores: Tensor
    query: Tensor

    @staticmethod
    def nothing() -> Chosen:
        """Return no groups."""
        return Chosen(torch.empty(0, dtype=torch.int64), torch.empty(0), torch.empty(0))


@define(frozen=True, eq=False)
class ReadGroups:
    """The groups that the texts of a batch read; their keys are rotated as layers ask for them.

    Attributes:
        kept: turns rows into segments.
        views: the streams, one for each text.
        chosen: of each text.
        positions: "zero": every row sits at position 0. "continual": rows sit at 0, 1, ... M - 1. "cumulative": in the
            n-th layer that reads at n times these places.
        offset: ``[B]`` int64, the position of each text's first token.
    """

    kept: KeptProjection
    views: Sequence[StreamView]
    chosen: Sequence[Chosen]
    positions: Positions
    offset: Tensor
    _places: list[Tensor] = field(factory=list, init=False)
    _made: dict[Any, Segment] = field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        places = [state_of(view).places(one.groups) for view, one in zip(self.views, self.chosen, strict=True)]
        # Under the released eviction the table can say more tokens than there are rows: what points past them is none.
        counts = [view.store.count(0) for view in self.views]
        self._places.extend(own[own < count] for own, count in zip(places, counts, strict=True))

    @property
    def lengths(self) -> list[int]:
        """Rows in front of each text."""
        return list(map(len, self._places))

    def ids(self, row: int) -> Tensor:
        """Return ``[n]`` int64, the ids in the store of the rows that one text reads."""
        ids = self.views[row].store.ids(0)
        return ids[self._places[row].to(ids.device)]

    def segments(self, turn: int, layer: int, hidden: Tensor) -> tuple[Segment, ...]:
        """Return what a layer sees; () where no text reads anything.

        Args:
            turn: which of the layers that read it is, from 0 on.
            layer: index among the layers that carry memory.
            hidden: ``[B, T, d]``, the text, which gives dtype and device.
        """
        if not max(self.lengths):
            return ()
        factor = turn + 1 if self.positions == "cumulative" else 1
        key = (factor, None if self.positions == "zero" else self.kept.table_key(layer), hidden.dtype, hidden.device)
        if key not in self._made:
            self._made[key] = self._segment(factor, layer, hidden)
        return (self._made[key],)

    def _segment(self, factor: int, layer: int, hidden: Tensor) -> Segment:
        lengths, most = self.lengths, max(self.lengths)
        parts = [
            nn.functional.pad(self._rows(row, hidden), (0, 0, 0, most - length)) for row, length in enumerate(lengths)
        ]
        rows = parts[0][None] if len(parts) == 1 else torch.stack(parts)
        segment = self.kept.turned(layer, [rows], self._tables(factor, layer, hidden))
        if min(lengths) == most:
            return segment
        return evolve(segment, lengths=torch.tensor(lengths, device=hidden.device))

    def _tables(self, factor: int, layer: int, hidden: Tensor) -> Tables | None:
        """Return what rotates the rows to their places; None: they stay as they are, which is position 0."""
        if self.positions == "zero":
            return None
        # A text keeps its place while the number of rows in front of it changes: what counts is how far away they are.
        moved = self.offset - torch.tensor(self.lengths)
        places = factor * torch.arange(max(self.lengths)) + moved[:, None]
        return self.kept.tables(layer, hidden, places.to(hidden.device))

    def _rows(self, row: int, hidden: Tensor) -> Tensor:
        """Return ``[n, w]``, the rows that one text reads, as they are kept."""
        if not len(self._places[row]):
            return hidden.new_empty(0, self.kept.size)
        store, ids = self.views[row].store, self.ids(row)
        found = store.locate(0, "projected", ids)
        if found is None:
            rows = store.gather(0, ids, leave_out=("key", "expiry")).columns()["projected"]
        else:
            column, where = found.contiguous()
            rows = column.index_select(0, where)
        check_finite("keys and values of a memory", rows)
        return rows.to(hidden)


def attend_gated(gate: Tensor, request: AttentionRequest, compute: Compute) -> AttentionResult:
    """Attend with scores of memory multiplied by s(g), and those of the text by 1 - s(g), before the one softmax.

    A query is laid out twice, side by side, with the two factors; keys of memory have zeros in the second half, those
    of the text in the first. So every backend computes it, grouped key heads included.

    Args:
        gate: ``[H]``, g of each query head.
        request: of the layer.
        compute: attends as usual.
    """
    share = gate.sigmoid().to(request.queries)[:, None, None]
    (segment,) = request.segments
    if segment.lengths is not None:  # a text that reads nothing is left alone
        share = share.masked_fill((segment.lengths == 0)[:, None, None, None], 0)
    queries = torch.cat([request.queries * share, request.queries * (1 - share)], -1)
    width = request.queries.shape[-1]
    pad = nn.functional.pad
    segments = tuple(evolve(one, keys=pad(one.keys, (0, width))) for one in request.segments)
    return compute(evolve(request, queries=queries, keys=pad(request.keys, (width, 0)), segments=segments, joined=None))
