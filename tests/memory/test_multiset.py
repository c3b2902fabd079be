"""The rows of a memory against plain lists: all that was written, less what a policy or a forget removed."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import mplus
from mplus.stores.base import StoreView
from mplus.stores.eviction import EvictionPolicy
from tests.conftest import NIGHTLY
from tests.memory.counting import LAYERS, counting_memory, numbers

if TYPE_CHECKING:
    from mplus.memory import Memory

Held = list[Counter[int]]
"""By layer, the numbers of the rows that must be there."""

CONFIGS: dict[str, dict[str, Any]] = {
    "grows": {"long_term_tokens": None},
    "fifo": {"long_term_tokens": 7, "drop_per_layer": False},
    "reservoir": {"long_term_tokens": 7, "eviction": "reservoir"},
    "lru": {"long_term_tokens": 7, "eviction": "lru"},
    "ttl": {"long_term_tokens": 9, "eviction": {"name": "ttl", "lifetime": 3.0}},
    "waits": {"long_term_tokens": 9, "mechanism": {"name": "mplus", "merge_every": 3}},
    "published": {
        "long_term_tokens": None,
        "variant": "published",
        "mechanism": {"name": "mplus", "merge_every": 2, "lifetime": 3.0},
    },
    "short": {"long_term_tokens": 0},
}


def places(memory: Memory, layer: int) -> list[Any]:
    """Rows of a layer in STM, pending and LTM."""
    state, store = memory.states[0], memory.stores[0]
    return [state.stm[layer], state.pending[layer], store.gather(layer, store.ids(layer))]


def held(memory: Memory) -> Held:
    """What is there."""
    return [Counter(n for rows in places(memory, layer) for n in numbers(rows)) for layer in range(LAYERS)]


class Watched(EvictionPolicy):
    """A policy, and a list of ``(layer, number)`` of all rows that it let go."""

    def __init__(self, policy: EvictionPolicy, removed: list[tuple[int, int]]) -> None:
        super().__init__(policy.options)
        self.policy, self.removed = policy, removed
        self.name, self.notes_reads = policy.name, policy.notes_reads  # type: ignore[misc]

    @property
    def lifetime(self) -> float | None:
        return self.policy.lifetime

    def using(self, usage: Any) -> EvictionPolicy:
        return Watched(self.policy.using(usage), self.removed)

    def select(self, store: StoreView, layer: int, excess: int) -> torch.Tensor:
        return self.noted(store, layer, self.policy.select(store, layer, excess))

    def expire(self, store: StoreView, layer: int, elapsed: float, spare: int) -> tuple[float, torch.Tensor]:
        after, ids = self.policy.expire(store, layer, elapsed, spare)
        return after, self.noted(store, layer, ids)

    def noted(self, store: StoreView, layer: int, ids: torch.Tensor) -> torch.Tensor:
        self.removed += [(layer, number) for number in numbers(store.gather(layer, ids))]
        return ids


class Rows(RuleBasedStateMachine):
    """Writes, forgets, copies and saves of one memory; every row has a number, and no number comes twice."""

    @initialize(config=st.sampled_from([*CONFIGS, "waits"]), seed=st.integers(0, 9))
    def begin(self, config: str, seed: int) -> None:
        """A new memory that keeps its texts."""
        sizes = {"memory_tokens_per_chunk": 2, "short_term_tokens": 5, "retrieved_tokens": 1}
        self.config = {**sizes, **CONFIGS[config]}
        self.memory = counting_memory(seed=seed, keep_text=True, **self.config)
        self.removed: list[tuple[int, int]] = []
        self.memory.eviction = Watched(self.memory.eviction, self.removed)
        self.expected: Held = [Counter() for _ in range(LAYERS)]
        self.sources: list[dict[int, str | None]] = [{} for _ in range(LAYERS)]
        for name in ("a", "b", "a"):
            self.write(20, name)

    @rule(tokens=st.integers(1, 30), name=st.sampled_from(["a", "b", None]))
    def write(self, tokens: int, name: str | None) -> None:
        """Each chunk adds rows with new numbers; what the policy let go is gone, and nothing else."""
        made = len(self.memory.engine.made)
        self.removed.clear()
        report = self.memory.write([7] * tokens, source=name)
        new = Counter(range(made, len(self.memory.engine.made)))
        for layer, now in enumerate(held(self.memory)):
            self.sources[layer].update(dict.fromkeys(new, name))
            everything = self.expected[layer] + new
            self.expected[layer] = everything - Counter(n for at, n in self.removed if at == layer)
            if self.config["long_term_tokens"] == 0 or self.config.get("variant") == "published":
                # No policy of the memory's own decides: what is gone is known by its number only.
                lost = report.dropped_rows[0] if self.config["long_term_tokens"] == 0 else report.evicted_rows[0]
                assert now <= everything, "rows come from nowhere, or twice"
                assert (everything - now).total() <= lost, "more rows are gone than the report says"
                self.expected[layer] = now

    @precondition(lambda self: self.memory.sources())
    @rule(which=st.integers(0, 2))
    def forget(self, which: int) -> None:
        """Just the rows of one source go, and the report counts them."""
        name = self.named(which)
        before = held(self.memory)
        report = self.memory.forget(name)
        for layer in range(LAYERS):
            mine = Counter(n for n in before[layer] if self.sources[layer][n] == name)
            self.expected[layer] = before[layer] - mine
            tiers = (report.short_term_rows, report.pending_rows, report.long_term_rows)
            assert sum(tier[layer] for tier in tiers) == mine.total()

    @precondition(lambda self: self.memory.sources())
    @rule(which=st.integers(0, 2))
    def rebuild(self, which: int) -> None:
        """All rows are new ones, of the other sources only."""
        name = self.named(which)
        made = len(self.memory.engine.made)
        others = [source for source in self.memory.sources() if source.name != name]
        self.memory.forget(name, mode="rebuild")
        for layer in range(LAYERS):
            self.expected[layer] = held(self.memory)[layer]
            assert all(number >= made for number in self.expected[layer])
            state = self.memory.states[0]
            for rows in places(self.memory, layer):
                named = [state.sources[number].name for number in rows.source.tolist()]
                self.sources[layer].update(zip(numbers(rows), named, strict=True))
                assert name not in named
        # In another order where a source was forgotten and written again.
        left = {source.name: (source.tokens, source.chunks) for source in self.memory.sources()}
        assert left == {source.name: (source.tokens, source.chunks) for source in others}

    def named(self, which: int) -> str | None:
        """One of the sources there are."""
        names = [source.name for source in self.memory.sources()]
        return names[which % len(names)]

    @rule()
    def go_on_with_a_fork(self) -> None:
        """A fork holds the same; what happens to the one left behind does not show."""
        left = self.memory
        self.memory = left.fork()
        made = list(left.engine.made)
        left.write([7] * 8, source="elsewhere")
        self.memory.engine.made[:] = made

    @rule()
    def save_and_load(self) -> None:
        """What is read back is what was saved."""
        with tempfile.TemporaryDirectory() as folder:
            self.memory.save(Path(folder) / "saved")
            model = torch.nn.Module()
            model.mplus_engine = self.memory.engine
            self.memory = mplus.Memory.load(Path(folder) / "saved", model)
            self.memory.eviction = Watched(self.memory.eviction, self.removed)

    @precondition(lambda self: self.memory.states[0].clock > 60)
    @rule()
    def reset(self) -> None:
        """Nothing is left."""
        self.memory.reset()
        self.expected = [Counter() for _ in range(LAYERS)]

    @invariant()
    def every_row_is_there_once(self) -> None:
        """STM, pending and LTM together are the list."""
        if not hasattr(self, "memory"):
            return
        assert held(self.memory) == self.expected
        state = self.memory.states[0]
        for layer in range(LAYERS):
            assert max(self.expected[layer].values(), default=1) == 1
            for rows in places(self.memory, layer):
                named = [state.sources[number].name for number in rows.source.tolist()]
                assert named == [self.sources[layer][number] for number in numbers(rows)]
            if self.memory.capacity is not None:
                assert self.memory.stores[0].count(layer) <= self.memory.capacity


TestRows = Rows.TestCase
TestRows.settings = settings(
    deadline=None, max_examples=300 if NIGHTLY else 25, stateful_step_count=50 if NIGHTLY else 20
)
