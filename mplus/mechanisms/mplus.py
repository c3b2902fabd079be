"""M+ (arXiv 2502.00592): rows dropped from the STM go to long-term memory; a retriever brings some of them back."""

from __future__ import annotations

from collections.abc import Sequence
from operator import add
from typing import Literal

import torch
from attrs import define, evolve, field
from torch import Tensor

from mplus.config import JsonValue, number, one_of, whole
from mplus.eviction.base import EvictionPolicy
from mplus.eviction.ttl import TtlEviction
from mplus.mechanisms.opened import Retrieved
from mplus.mechanisms.root import Absorbed
from mplus.mechanisms.short_term.bring_back import bring_back_each
from mplus.mechanisms.short_term.mechanism import RowMechanism
from mplus.mechanisms.short_term.pending import PendingView
from mplus.mechanisms.short_term.state import ShortTermState, short_term_state, state_of
from mplus.memory.merging.incoming import Incoming
from mplus.memory.state import StreamState, StreamView
from mplus.memory.writing.update import WriteContext
from mplus.retrievers.base import Selection, check_selected
from mplus.rows import MemoryRows
from mplus.stores.base import Column, Content, StoreLayout, StoreView


class MPlusMechanism(RowMechanism):
    """Reads ``[begin | retrieved LTM rows, oldest first | STM | text]``."""

    @define(frozen=True, kw_only=True)
    class Options(RowMechanism.Options):
        """Options of M+: those it shares with MemoryLLM, and ways in which the released code differs from the paper.

        Attributes:
            ages: "birth" orders rows by when they were written; "release" by when they left the STM and then by
                their place in the chunk, later ids first among equals.
            merge_every: rows that leave the STM wait for a merge every so many writes; None: no waiting.
            lifetime: merges after which a long-term row expires (without waiting every write is one), whatever the
                eviction policy does at capacity; None: as the policy says. "ttl" goes before this option.
            decay: how much of its lifetime a row loses per merge.
            short_ltm: with fewer long-term rows than a read asks for, "all" uses each once, pending rows included;
                "tile" repeats the merged ones.
        """

        ages: Literal["birth", "release"] = field(default="birth", validator=one_of("birth", "release"))
        merge_every: int | None = field(default=None, validator=whole(1, optional=True))
        lifetime: float | None = None
        decay: float = field(default=1.0, validator=number(0))
        short_ltm: Literal["all", "tile"] = field(default="all", validator=one_of("all", "tile"))

        @classmethod
        def defaults(cls, variant: str) -> dict[str, JsonValue]:
            """Values of the released 8B model for the variant "published"."""
            if variant != "published":
                return {}
            return {"ages": "release", "merge_every": 60, "lifetime": 10.0, "short_ltm": "tile"}

    name = "mplus"
    batched = True
    uses_retriever = True

    @property
    def expiry(self) -> bool:
        return self.options.lifetime is not None

    def lifetime(self, eviction: EvictionPolicy) -> float | None:
        return self.countdown(eviction).lifetime

    @property
    def waiting_rows(self) -> int:
        if self.options.merge_every is None or self.config.long_term_tokens == 0:
            return 0
        return int(self.options.merge_every) * self.config.memory_tokens_per_chunk

    def _first_state(self, layout: StoreLayout) -> ShortTermState:
        state = super()._first_state(layout)
        counters = {
            "writes_since_merge": torch.zeros((), dtype=torch.int64),
            "decayed": torch.zeros(layout.layers, dtype=torch.float64),
        }
        stm = state.stm
        if self.options.ages == "release":
            # Rows that came with the checkpoint count as slot K-1 of a chunk: age 0.
            stm = tuple(rows.replace(birth=torch.full_like(rows.birth, -1)) for rows in stm)
        pending = tuple(
            MemoryRows.empty(
                layout.hidden_size if layout.keeps_hidden else 0,
                key_size=self.key_size,
                projected_size=layout.projected_size,
                dtype=layout.dtype,
                device=layout.device,
            )
            for _ in range(layout.layers)
        )
        clock = 0 if self.options.ages == "release" else state.clock
        return evolve(state, stm=stm, pending=pending, clock=clock, counters=counters)

    def _births(self, state: ShortTermState, k: int) -> Tensor:
        if self.options.ages == "release":
            # In the STM ages stand still: -1 - age within the chunk. The clock is added when a row leaves.
            return torch.arange(-k, 0, dtype=torch.int64)
        return super()._births(state, k)

    def keep_dropped(
        self, state: ShortTermState, dropped: Sequence[MemoryRows], context: WriteContext
    ) -> tuple[ShortTermState, int]:
        if self.config.long_term_tokens == 0:
            return state, 0
        leaving = [
            rows if rows.hidden is None else rows.replace(key=context.keys(layer, rows.hidden))
            for layer, rows in enumerate(dropped)
        ]
        if self.options.ages == "release":
            leaving = [rows.replace(birth=rows.birth + state.clock) for rows in leaving]
        if self.options.merge_every is None:
            return self._store(state, leaving, context)
        pending = tuple(MemoryRows.cat(pair) for pair in zip(state.pending, leaving, strict=True))
        writes = state.counters["writes_since_merge"] + 1
        state = evolve(state, pending=pending, counters={**state.counters, "writes_since_merge": writes})
        return self.merge(state, context) if int(writes) >= self.options.merge_every else (state, 0)

    def combine(self, state: StreamState, other: Incoming, context: WriteContext) -> Absorbed:
        """Take in all rows of another stream, also those that wait for a merge; do it if they have waited enough."""
        state = short_term_state(state)
        theirs = state_of(other.view)
        pending = other.merged("pending", state.pending, theirs.pending, state)
        waited = state.counters["writes_since_merge"] + theirs.counters["writes_since_merge"]
        counters = {**state.counters, "writes_since_merge": waited}
        absorbed = super().combine(evolve(state, pending=tuple(pending), counters=counters), other, context)
        every, after = self.options.merge_every, short_term_state(absorbed.state)
        if every is None or int(after.counters["writes_since_merge"]) < every:
            return absorbed
        merged, evicted = self.merge(after, context)
        return evolve(absorbed, state=merged, evicted=absorbed.evicted + evicted)

    def waiting(self, state: ShortTermState, rows: Sequence[MemoryRows]) -> ShortTermState:
        """Return ``state`` with ``rows``, per layer, and no others waiting for the next merge."""
        return evolve(state, pending=tuple(rows))

    def merge(self, state: ShortTermState, context: WriteContext) -> tuple[ShortTermState, int]:
        """Move pending rows into long-term memory and let rows expire.

        Returns the new state and the rows evicted per layer.
        """
        state, evicted = self._store(state, state.pending, context)
        none = torch.arange(0)  # an index, not a slice: a view would keep all the rows alive
        pending = tuple(rows.select(none) for rows in state.pending)
        counters = {**state.counters, "writes_since_merge": torch.zeros((), dtype=torch.int64)}
        return evolve(state, pending=pending, counters=counters), evicted

    def _store(
        self, state: ShortTermState, added: Sequence[MemoryRows], context: WriteContext
    ) -> tuple[ShortTermState, int]:
        """Append rows to long-term memory and let others expire or make room.

        Published rule: every row, new ones included, loses some of its lifetime; expired rows leave only if more rows
        than one read retrieves survive, otherwise the loss is undone.
        """
        store, policy, decayed = context.store, self.countdown(context.eviction), state.counters["decayed"].clone()
        expired = [0] * len(added)
        for layer, rows in enumerate(added):
            if len(rows):
                expires = None if policy.lifetime is None else policy.lifetime + float(decayed[layer])
                expiry = None if expires is None else torch.full_like(rows.birth, expires, dtype=torch.float64)
                store.append(layer, rows if expiry is None else rows.replace(expiry=expiry))
            if policy.lifetime is not None:
                elapsed, gone = policy.expire(
                    context.evictable, layer, float(decayed[layer]), self.config.retrieved_tokens
                )
                decayed[layer] = elapsed
                store.remove(layer, gone)
                expired[layer] = gone.shape[0]
        if policy.lifetime is not None:
            state = evolve(state, counters={**state.counters, "decayed": decayed})
        return state, max(map(add, expired, context.evict()))

    def countdown(self, eviction: EvictionPolicy) -> EvictionPolicy:
        """The policy by which rows of a memory under ``eviction`` expire, if they do: it, or that of the options."""
        if eviction.lifetime is not None or self.options.lifetime is None:
            return eviction
        return TtlEviction(TtlEviction.Options(lifetime=self.options.lifetime, decay=self.options.decay))

    def retrieve(self, layer: int, hidden: Tensor, mask: Tensor, views: Sequence[StreamView]) -> list[Retrieved | None]:
        k = self.config.retrieved_tokens
        if self.config.long_term_tokens == 0 or k == 0:
            return [None] * len(views)
        found: list[Retrieved | None] = [None] * len(views)
        scored: list[tuple[int, StoreView]] = []
        joined: dict[tuple[int, int], StoreView] = {}
        for row, view in enumerate(views):
            pending = state_of(view).pending
            if self.options.short_ltm == "tile" and view.store.count(layer) < k:
                found[row] = self._tile(view.store, layer, k)
            elif len(pending[layer]):
                # Rows that share what they hold share what is made of it: a retriever reads that once.
                same = id(view.store), id(pending)
                scored.append((row, joined.setdefault(same, PendingView(view.store, pending))))
            elif view.store.count(layer):
                scored.append((row, view.store))
        if scored and self.retriever is not None:  # built where there is long-term memory
            if len(scored) < len(views):
                which = torch.tensor([row for row, _ in scored], device=hidden.device)
                hidden, mask = hidden[which], mask[which]
            queries, stores = self.retriever.project_queries(layer, hidden), [store for _, store in scored]
            picks = self.retriever.select(layer, queries, mask, stores, k)
            check_selected(picks, self.retriever.name, stores, k)
            back = self._picked(layer, stores, picks)
            for (row, _), brought in zip(scored, back, strict=True):
                found[row] = brought
        for view, rows in zip(views, found, strict=True):
            _note(view, layer, rows)
        return found

    def _picked(self, layer: int, stores: Sequence[StoreView], picks: Sequence[Selection]) -> list[Retrieved]:
        """Return the rows that were picked of each store, in any order, oldest first."""
        found = []
        back = bring_back_each(stores, layer, picks, newest_last=self.options.ages != "release")
        for store, pick, rows in zip(stores, picks, back, strict=True):
            if rows is not None:
                found.append(rows)
                continue
            ids, by_id = torch.sort(pick.ids)
            scores = pick.scores.index_select(0, by_id.to(pick.scores.device))
            found.append(self.bring_back(store, layer, ids, scores))
        return found

    def searched(self, view: StreamView, layer: int) -> StoreView:
        """Return the long-term rows of a layer, and those that wait for a merge."""
        pending = state_of(view).pending
        return PendingView(view.store, pending) if len(pending[layer]) else view.store

    def retrieved_rows(self, view: StreamView, layer: int) -> int:
        if self.config.long_term_tokens == 0:
            return 0
        merged, k = view.store.count(layer), self.config.retrieved_tokens
        if self.options.short_ltm == "tile":
            return k if merged else 0
        return min(k, merged + len(state_of(view).pending[layer]))

    def _tile(self, store: StoreView, layer: int, k: int) -> Retrieved | None:
        ids = store.ids(layer)
        if not len(ids):
            return None
        # The last k of the rows repeated without end: the newest come last, as often as K0 is larger than the LTM.
        place = torch.arange(-k, 0, device=ids.device) % len(ids)
        return self.bring_back(store, layer, ids[place], torch.empty(0))

    def bring_back(self, store: StoreView, layer: int, ids: Tensor, scores: Tensor) -> Retrieved:
        """Oldest birth first; among equals in the order of ``ids``, or against it for "release" ages."""
        if self.options.ages == "release":
            ids, scores = ids.flip(0), scores.flip(0)
        narrow = store.gather(layer, ids, leave_out=("key", "expiry", "hidden", "projected"))
        if bool((narrow.birth[1:] < narrow.birth[:-1]).any()):
            order = narrow.birth.argsort(stable=True)
            ids, narrow = ids[order], narrow.select(order)
            scores = scores[order.to(scores.device)] if len(scores) else scores
        # Keys and values are copied once, by whoever puts them into place.
        located = store.locate(layer, "projected", ids) if store.layout.projected_size else None
        if located is not None and not store.layout.keeps_hidden:
            rows = narrow.replace(key=None, expiry=None, projected=None)
        else:
            without: Sequence[Column | Content] = (
                ("key", "expiry") if located is None else ("key", "expiry", "projected")
            )
            rows = store.gather(layer, ids, leave_out=without)
        return Retrieved(rows, ids, scores, located)


def _note(view: StreamView, layer: int, rows: Retrieved | None) -> None:
    """That these rows were retrieved, where the eviction policy asks for it."""
    if view.access_log is None or rows is None:
        return
    ids = rows.ids
    if len(state_of(view).pending[layer]) and len(rows.scores):  # then these are places in a PendingView
        merged = view.store.ids(layer)
        ids = merged[ids[ids < len(merged)]]
    view.access_log.record(layer, ids, view.state.clock)
