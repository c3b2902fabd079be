"""The tail of a stream as rows: what every layer receives for text that waits, right in front of the text of a read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from attrs import define, evolve
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mplus.backends.base import Segment
from mplus.errors import NotSupported
from mplus.mechanisms.decoder import Decoder, Project, RowPositions, Rows
from mplus.mechanisms.opened import Opened, Retrieved
from mplus.mechanisms.short_term.prefix_cache import Prepared
from mplus.memory.state import StreamView

if TYPE_CHECKING:
    from mplus.mechanisms.decoder import KeptProjection


class Reader(Protocol):
    """The parts of a mechanism that a pass over a tail needs; see ``mplus.mechanisms.base.MemoryMechanism``."""

    def retrieve(
        self, layer: int, hidden: Tensor, mask: Tensor, views: Sequence[StreamView]
    ) -> list[Retrieved | None]: ...
    def prefix(
        self, opened: Opened, layer: int, found: Sequence[Retrieved | None], hidden: Tensor, project: Project
    ) -> tuple[Segment, ...]: ...
    def has_prefix(self, view: StreamView) -> bool: ...
    def prefix_rows(self, view: StreamView) -> int: ...
    def prepare(self, projection: KeptProjection, batch: int | None) -> Prepared: ...
    def prepare_together(self, prepared: Sequence[Prepared]) -> Prepared: ...


@define(frozen=True, eq=False)
class TailRows:
    """The rows that stand for the tails of the streams of one read.

    A row is what a layer receives, so its keys and values are those of the token that it stands for.

    Attributes:
        layers: per layer that carries memory ``[S, t, d]``, of streams that have a tail; filler behind shorter ones.
        places: of each view, its stream among these; None: nothing waits.
        counts: of each view, the tokens of its tail.
        positions: where rows sit that do not simply follow one another; None: all do.
    """

    layers: tuple[Tensor, ...]
    places: Sequence[int | None]
    counts: Sequence[int]
    positions: RowPositions | None = None

    def of(self, view: int, layer: int) -> Tensor | None:
        """Return ``[n, d]``, the tail of one view as the layer receives it; None: nothing waits."""
        place = self.places[view]
        return None if place is None else self.layers[layer][place, : self.counts[view]]

    def together(self, layer: int) -> Rows:
        """Return the tails of all views, filler behind shorter ones, right in front of the text as text would be."""
        rows = self.layers[layer]
        if len(set(self.places)) == 1:
            return Rows(rows, positions=torch.arange(-rows.shape[1], 0, device=rows.device)[None])
        counts = torch.tensor(self.counts, device=rows.device)
        positions = torch.arange(rows.shape[1], device=rows.device) - counts[:, None]
        return Rows(rows[[place or 0 for place in self.places]], counts, positions=positions)

    def placed(self, rows: Rows, lengths: Sequence[int]) -> Rows:
        """Return the rows of all views, of ``lengths`` and with their tails at the end, where they sit.

        Memory is squeezed together as it is configured; the tail stands between it and the text, as text would.
        """
        if self.positions is None:
            return rows
        place = torch.arange(rows.hidden.shape[1], device=rows.hidden.device)
        total, tails = (torch.tensor(each, device=place.device)[:, None] for each in (lengths, self.counts))
        memory = total - tails
        where = self.positions.of_rows(place.expand(len(total), -1), memory, -tails)
        return evolve(rows, positions=torch.where(place < memory, where, place - total))


SHARED = "tails"
"""The key in ``Text.shared`` of the last states whose tails were read, and the rows ``TailRows.layers`` of these."""


def read_tails(
    mechanism: Reader, decoder: Decoder, views: Sequence[StreamView], shared: dict[str, Any] | None = None
) -> TailRows:
    """Read the tails of some streams, one of which has one at least, as a read would: one pass, behind their memory.

    Args:
        mechanism: of the memory.
        decoder: runs the pass.
        views: of the streams; views of the same state share what is computed.
        shared: by other reads of these states, as ``Text.shared`` gives it; None: by none.
    """
    distinct = list({id(view.state): view for view in views if view.state.tail}.values())
    numbers = {id(view.state): number for number, view in enumerate(distinct)}
    counts = [view.state.tail_tokens for view in distinct]
    # Where the eviction policy goes by what is retrieved, every read has to retrieve.
    table = {} if shared is None or any(view.access_log is not None for view in distinct) else shared
    states, made = table.get(SHARED, ((), ()))
    if list(map(id, states)) != list(numbers):
        made = _read(mechanism, decoder, distinct, counts)
        table[SHARED] = ([view.state for view in distinct], made)
    places = [numbers.get(id(view.state)) for view in views]
    tokens = [0 if place is None else counts[place] for place in places]
    return TailRows(made, places, tokens, _positions(decoder))


def read_tails_of_each(
    mechanism: Reader, decoder: Decoder, views: Sequence[StreamView], tables: Sequence[dict[str, Any] | None]
) -> TailRows:
    """Read the tails of streams of different memories as ``read_tails`` does, in one pass for those not read before.

    Args:
        mechanism, decoder, views: as there.
        tables: of each view, what reads of its memory share; None: nothing.
    """
    table_of = {id(view.state): table for view, table in zip(views, tables, strict=True)}
    distinct = list({id(view.state): view for view in views if view.state.tail}.values())
    made: dict[int, tuple[Tensor, ...]] = {}
    for view in distinct:
        table = None if view.access_log is not None else table_of[id(view.state)]
        states, layers = (table or {}).get(SHARED, ((), ()))
        if len(states) == 1 and states[0] is view.state:
            made[id(view.state)] = tuple(rows[0] for rows in layers)
    unread = [view for view in distinct if id(view.state) not in made]
    if unread:
        counts = [view.state.tail_tokens for view in unread]
        read = _read(mechanism, decoder, unread, counts)
        for place, (view, count) in enumerate(zip(unread, counts, strict=True)):
            # Copies: a view would keep the rows of all others.
            own = tuple(rows[place : place + 1, :count].clone() for rows in read)
            made[id(view.state)] = tuple(rows[0] for rows in own)
            table = table_of[id(view.state)]
            if table is not None:
                table[SHARED] = ([view.state], own)
    numbers = {id(view.state): number for number, view in enumerate(distinct)}
    places = [numbers.get(id(view.state)) for view in views]
    tokens = [0 if place is None else distinct[place].state.tail_tokens for place in places]
    rows_of_layers = zip(*(made[id(view.state)] for view in distinct), strict=True)
    layers = tuple(pad_sequence(list(rows), batch_first=True) for rows in rows_of_layers)
    return TailRows(layers, places, tokens, _positions(decoder))


def _read(
    mechanism: Reader, decoder: Decoder, distinct: Sequence[StreamView], counts: Sequence[int]
) -> tuple[Tensor, ...]:
    """Return per layer that carries memory ``[S, t, d]``, what it receives for the tails of streams that have one.

    Args:
        mechanism, decoder: as above.
        distinct: views of the streams.
        counts: tokens of each tail.
    """
    ids = torch.zeros(len(distinct), max(counts), dtype=torch.int64, device=decoder.shape.device)
    for row, view in enumerate(distinct):
        ids[row, : counts[row]] = torch.cat([part.ids for part in view.state.tail]).to(ids)
    mask = torch.arange(ids.shape[1], device=ids.device) < torch.tensor(counts, device=ids.device)[:, None]
    behind = [evolve(view, state=evolve(view.state, tail=())) for view in distinct]
    opened = Opened(behind, prepared=_prepared(mechanism, decoder, behind))

    def prefix(layer: int, hidden: Tensor, project: Project) -> tuple[Segment, ...]:
        if not any(map(mechanism.has_prefix, behind)):
            return ()
        with torch.no_grad():
            found = mechanism.retrieve(layer, hidden, mask, behind)
        return mechanism.prefix(opened, layer, found, hidden, project)

    rows = max(map(mechanism.prefix_rows, behind))
    # Padding is behind the text, where no real token sees it.
    return decoder.run(ids, prefix=prefix, prefix_rows=rows, adapter="read", collect={"inputs"}).inputs


def _prepared(mechanism: Reader, decoder: Decoder, views: Sequence[StreamView]) -> Prepared | None:
    """Return what reads of rows that are kept as keys and values go by; None: there are hidden states of all."""
    layouts = [view.store.layout for view in views]
    if all(layout.keeps_hidden for layout in layouts):
        return None
    if all(layout.projected_size for layout in layouts):
        return mechanism.prepare(decoder.kept, None)
    return mechanism.prepare_together([mechanism.prepare(decoder.kept, None) for _ in views])


def _positions(decoder: Decoder) -> RowPositions | None:
    """Return where rows sit, unless they follow one another, or the decoder does not let rows be placed."""
    try:
        positions = decoder.kept.positions
    except NotSupported:  # then the tail is placed as all other rows are
        return None
    return None if positions.layout == "sequential" or positions.offset else positions
