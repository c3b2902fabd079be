"""Budget: the limit of long-term memory, in rows by the config, or in bytes for all of the memory."""

from __future__ import annotations

from typing import Protocol

from attrs import define

from mplus.config import MPlusConfig, byte_count
from mplus.errors import ConfigError
from mplus.stores.base import MemoryStore, StoreLayout


class SizedMechanism(Protocol):
    """The parts of a mechanism that say how much room its memories need."""

    @property
    def long_term(self) -> bool: ...
    def reserve(self, layout: StoreLayout) -> int: ...
    def bytes_beside(self, rows: int) -> int: ...
    def capacity(self, rows: int) -> int: ...


@define(frozen=True)
class Budget:
    """The limit of the long-term memory.

    Attributes:
        capacity: rows per layer that the LTM of each stream may hold after a write; None: no limit.
        bytes: what all rows of the memory may take together, short-term, pending and long-term, in all layers and
            streams, with the room that is reserved for more; None: no budget, the capacity was given in rows.
    """

    capacity: int | None
    bytes: int | None = None

    @staticmethod
    def of(
        wanted: int | str | None, config: MPlusConfig, mechanism: SizedMechanism, store: MemoryStore, streams: int
    ) -> Budget:
        """Return the limit of a new memory.

        Each stream gets an equal share. Of it the rows of a full STM are taken, of as many pending rows as can wait
        for a merge, and the hidden states kept for the next write; long-term rows, and what their store reserves
        beside them, get the rest.

        Args:
            wanted: ``bytes_budget`` of this memory; None: that of ``config``.
            config, mechanism: say what a stream holds besides long-term rows.
            store: of a stream; all are alike.
            streams: of the memory.

        Raises:
            ConfigError: this is no number of bytes, or too few for short-term memory and the long-term rows of a chunk.
        """
        wanted = config.bytes_budget if wanted is None else wanted
        if wanted is None:
            return Budget(config.long_term_tokens)
        budget, layout = byte_count(wanted), store.layout
        fixed = layout.layers * mechanism.reserve(layout)
        row = layout.layers * store.bytes_per_row
        least = fixed
        if mechanism.long_term:
            least += layout.layers * store.bytes_for(config.memory_tokens_per_chunk)
            least += mechanism.bytes_beside(config.memory_tokens_per_chunk)
        if budget < streams * least:
            raise ConfigError(
                f"bytes_budget must be at least {streams * least:,} bytes for {streams} "
                f"{'streams' if streams > 1 else 'stream'} ({fixed:,} for the short-term memory of each, {row:,} for a "
                f"long-term row in all layers, {config.memory_tokens_per_chunk} rows a chunk, and room between rows), "
                f"got {wanted!r}: give more, or lower short_term_tokens"
            )
        capacity = _rows_within(budget // streams - fixed, store, mechanism) if mechanism.long_term else 0
        return Budget(capacity, budget)

    def text_tokens(self, mechanism: SizedMechanism) -> int | None:
        """Return how many text tokens the LTM of a stream has room for; None: no limit."""
        return None if self.capacity is None else mechanism.capacity(self.capacity)


def _rows_within(room: int, store: MemoryStore, mechanism: SizedMechanism) -> int:
    """Return the largest number of long-term rows a layer for which a stream takes no more than ``room`` bytes."""

    def taken(rows: int) -> int:
        return store.layout.layers * store.bytes_for(rows) + mechanism.bytes_beside(rows)

    fits, too_many = 0, room // (store.layout.layers * store.bytes_per_row) + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if taken(middle) <= room else (fits, middle)
    return fits
