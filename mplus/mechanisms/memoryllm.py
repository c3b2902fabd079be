"""MemoryLLM (arXiv 2402.04624): a short-term pool only; what it drops is gone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import define, evolve, field

from mplus.config import JsonValue, flag
from mplus.errors import ConfigError
from mplus.mechanisms.root import Absorbed
from mplus.mechanisms.short_term.mechanism import RowMechanism
from mplus.mechanisms.short_term.state import ShortTermState, short_term_state, state_of
from mplus.mechanisms.short_term.write import WritePlan
from mplus.memory.state import StreamState, StreamView
from mplus.memory.writing.update import Update, WriteContext
from mplus.rows import MemoryRows


class MemoryLLMMechanism(RowMechanism):
    """Writes as M+ does, reads ``[begin | STM | text]``."""

    @define(frozen=True, kw_only=True)
    class Options(RowMechanism.Options):
        """Options of MemoryLLM, besides those that it shares with M+.

        Attributes:
            tile_first: the first write into an empty memory is repeated until the pool is full, and neither it nor
                a read before it sees a begin row (published); otherwise the pool grows.
        """

        tile_first: bool = field(default=False, validator=flag)

        def __attrs_post_init__(self) -> None:
            if self.tile_first and self.rows == "inputs":
                raise ConfigError(
                    "rows must be 'outputs' with tile_first, whose first rows carry the mark of the next layer, "
                    "got 'inputs'"
                )
            if self.tile_first and self.tokens != "last":
                raise ConfigError(f"tokens must be 'last' with tile_first, as published, got {self.tokens!r}")

        @classmethod
        def defaults(cls, variant: str) -> dict[str, JsonValue]:
            """The published code fills the pool with the first block."""
            return {"tile_first": True} if variant == "published" else {}

    name = "memoryllm"
    batched = True
    pins = False  # rows leave the pool at random

    def plan_write(self, state: ShortTermState, tokens: int, reencode: bool = True) -> WritePlan:
        plan = super().plan_write(state, tokens, reencode)
        if self._unfilled(state):
            return evolve(plan, begin=False, overlap=True)
        return plan

    def absorb(self, state: StreamState, update: Update, source: int, context: WriteContext) -> Absorbed:
        if self._unfilled(short_term_state(state)):
            n = self.config.short_term_tokens
            k = update.hidden[0].shape[0]
            # As often as it fits, and the rest of the pool with its last rows.
            place = torch.cat([torch.arange(n - n % k) % k, torch.arange(k - n % k, k)])
            hidden, projected = (
                tuple(rows[place.to(rows.device)] for rows in layers) for layers in (update.hidden, update.projected)
            )
            update = Update(hidden, projected)
        return super().absorb(state, update, source, context)

    def keep_dropped(
        self, state: ShortTermState, dropped: Sequence[MemoryRows], context: WriteContext
    ) -> tuple[ShortTermState, int]:
        return state, 0

    def has_begin(self, view: StreamView) -> bool:
        return not self._unfilled(state_of(view))

    def _unfilled(self, state: ShortTermState) -> bool:
        return bool(self.options.tile_first) and not len(state.stm[0])
