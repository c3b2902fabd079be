"""Rules for streams that were read from files. Nothing behind these checks looks at them again.

The form of rows (``mplus.memory.format.columns.check_columns``) is checked wherever a state is made of parts
(``StreamState.from_parts``), their values (``check_values``) once all there is was read, and what the decoder's
mechanism expects (``check_fits``) where there is a decoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mplus.errors import MemoryMismatchError
from mplus.rows import NO_SOURCE, MemoryRows
from mplus.stores.base import StoreLayout

if TYPE_CHECKING:
    from mplus.memory.engine import Engine
    from mplus.memory.state import StreamState

FURTHEST_BACK = 2**31
"""How many rows before the first one of its own clock a memory may begin with."""
PIECE_ROWS = 1024


def rules(rows: MemoryRows, clock: int, known: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    """Yield each rule for births and sources of rows, in words, with ``[n]`` bool: the rows that keep it.

    Args:
        rows: any.
        clock: of their stream.
        known: ``[m]`` int64, ascending: the numbers of its sources; None: nobody knows.
    """
    births, sources = rows.birth, rows.source.cpu()
    # Below 0: rows that an imported memory or a pool began with, and short-term ones that count back ("release" ages).
    right = (births >= -FURTHEST_BACK) & (births < clock)
    yield f"births below the clock, {clock}, and none below {-FURTHEST_BACK}", right
    if known is not None:
        of_a_source = torch.zeros_like(sources, dtype=torch.bool)
        if len(known):
            of_a_source = known[torch.searchsorted(known, sources).clamp(max=len(known) - 1)] == sources
        yield "sources that the stream has", (of_a_source | (sources == NO_SOURCE)).to(births.device)


def finite(rows: MemoryRows) -> Iterator[tuple[str, Tensor]]:
    """Yield the rules for the content of rows, as ``rules`` does."""
    for name in ("hidden", "key", "projected"):
        column = rows.columns().get(name)
        if column is not None:
            pieces = column.split(PIECE_ROWS)  # the test takes as much room as what it looks at
            yield f"finite values in {name!r}", torch.cat([piece.isfinite().all(1) for piece in pieces])


def sound(rows: MemoryRows, clock: int, known: Tensor) -> Tensor:
    """Return ``[n]`` bool: the rows that keep all of ``rules`` and ``finite``."""
    kept = torch.ones(len(rows), dtype=torch.bool, device=rows.birth.device)
    for _, right in (*rules(rows, clock, known), *finite(rows)):
        kept &= right
    return kept


def check_rows(rows: MemoryRows, clock: int, known: Tensor, where: str) -> None:
    """Raise MemoryMismatchError where a row breaks one of ``rules``."""
    for rule, kept in rules(rows, clock, known):
        if not bool(kept.all()):
            raise MemoryMismatchError(f"{where} must have {rule}, {int((~kept).sum())} of {len(rows)} rows break it")


def check_values(state: StreamState) -> None:
    """Raise MemoryMismatchError unless births and sources of all rows but the long-term ones can be those of a stream.

    (What long-term rows say is checked as it is read: see ``mplus.stores.disk.verified.Rule``.)
    """
    known = state.sources.column("number")
    for name, parts in state.row_lists().items():
        for layer, rows in enumerate(parts):
            check_rows(rows, state.clock, known, f"{name} of layer {layer}")


def check_fits(states: Sequence[StreamState], engine: Engine, layout: StoreLayout) -> None:
    """Raise MemoryMismatchError unless each stream has what the decoder's mechanism keeps.

    That is: the columns and counters of a new stream, and texts of ids in the vocabulary.
    """
    new = engine.new_state(layout)
    for number, state in enumerate(states):
        state.check_like(new, f"stream {number}")
        ids = [text.ids for text in (() if state.texts is None else state.texts.chunks())]
        ids += [part.ids for part in state.tail]
        if not all(bool((part < engine.vocab_size).all()) for part in ids):
            raise MemoryMismatchError(
                f"the texts of stream {number} must have ids in the vocabulary, 0 to {engine.vocab_size - 1}"
            )
