"""A store as Python lists, and a state machine that drives an implementation and the lists side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from attrs import Factory, define, field
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mplus.rows import MemoryRows
from mplus.stores.base import MemoryStore, StoreLayout, StoreView
from mplus.testing.strategies import draw_rows, sizes

LAYOUT = StoreLayout(layers=2, hidden_size=3, key_size=2, expiry=True)


@define
class ModelLayer:
    """Rows of one layer as ``(id, one row)`` and the largest id ever given."""

    rows: list[tuple[int, MemoryRows]] = Factory(list)
    last: int = -1

    def copy(self) -> ModelLayer:
        """An independent list of the same rows."""
        return ModelLayer(list(self.rows), self.last)


Check = Callable[[StoreView, int, list[tuple[int, MemoryRows]]], None]


@define
class Pair:
    """A store or a snapshot, and what it has to hold."""

    real: Any
    model: list[ModelLayer] = field()

    @staticmethod
    def new(store: MemoryStore) -> Pair:
        """An empty store."""
        return Pair(store, [ModelLayer() for _ in range(store.layout.layers)])

    def twin(self, real: Any) -> Pair:
        """``real`` is to hold what this holds now."""
        return Pair(real, [layer.copy() for layer in self.model])


class StoreMachine(RuleBasedStateMachine):
    """Any sequence of appends, removals, snapshots, restores and forks; everything alive is compared at each step."""

    def __init__(self, make: Callable[[StoreLayout], MemoryStore], check: Check) -> None:
        super().__init__()
        self.check = check
        self.stores = [Pair.new(make(LAYOUT))]
        self.snapshots: list[tuple[int, Pair]] = []

    @rule(which=sizes(3), layer=sizes(1), count=sizes(6), seed=st.integers(0, 2**16))
    def append(self, which: int, layer: int, count: int, seed: int) -> None:
        """Append ``count`` rows."""
        pair = self.stores[which % len(self.stores)]
        rows, model = draw_rows(LAYOUT, count, seed), pair.model[layer]
        ids = pair.real.append(layer, rows).tolist()
        assert len(ids) == count
        for place, row_id in enumerate(ids):
            assert row_id > model.last, "ids grow and are never given twice"
            model.rows.append((row_id, rows.select(slice(place, place + 1))))
            model.last = row_id

    @rule(which=sizes(3), layer=sizes(1), count=sizes(6), end=st.sampled_from(["oldest", "latest"]))
    def remove_from_an_end(self, which: int, layer: int, count: int, end: str) -> None:
        """Remove the oldest or newest rows."""
        pair = self.stores[which % len(self.stores)]
        present = [row_id for row_id, _ in pair.model[layer].rows]
        self._remove(pair, layer, present[:count] if end == "oldest" else present[max(len(present) - count, 0) :])

    @rule(which=sizes(3), layer=sizes(1), places=st.lists(st.integers(0, 30), max_size=8))
    def remove_any(self, which: int, layer: int, places: list[int]) -> None:
        """Remove rows from anywhere, in any order."""
        pair = self.stores[which % len(self.stores)]
        present = [row_id for row_id, _ in pair.model[layer].rows]
        self._remove(pair, layer, [present[place % len(present)] for place in places] if present else [])

    def _remove(self, pair: Pair, layer: int, ids: list[int]) -> None:
        pair.real.remove(layer, torch.tensor(ids, dtype=torch.int64))
        pair.model[layer].rows = [row for row in pair.model[layer].rows if row[0] not in ids]

    @rule(which=sizes(3))
    def snapshot(self, which: int) -> None:
        """Take a snapshot (of the last few, old ones are let go)."""
        which %= len(self.stores)
        pair = self.stores[which]
        self.snapshots = [*self.snapshots[-2:], (which, pair.twin(pair.real.snapshot()))]

    @precondition(lambda self: self.snapshots)
    @rule(which=sizes(3))
    def restore(self, which: int) -> None:
        """Take a store back to one of its snapshots."""
        owner, snapshot = self.snapshots[which % len(self.snapshots)]
        store = self.stores[owner].real
        given = [layer.last for layer in self.stores[owner].model]
        store.restore(snapshot.real)
        self.stores[owner] = snapshot.twin(store)
        for layer, last in zip(self.stores[owner].model, given, strict=True):
            layer.last = last  # also ids given after the snapshot are never given again

    @precondition(lambda self: len(self.stores) < 3)
    @rule(which=sizes(3))
    def fork(self, which: int) -> None:
        """Fork a store; both go on."""
        pair = self.stores[which % len(self.stores)]
        self.stores.append(pair.twin(pair.real.fork()))

    @invariant()
    def everything_agrees(self) -> None:
        """Stores and snapshots hold what the lists hold."""
        for pair in [*self.stores, *(pair for _, pair in self.snapshots)]:
            for layer, model in enumerate(pair.model):
                self.check(pair.real, layer, model.rows)

    def teardown(self) -> None:
        """Let the stores release what they hold."""
        for pair in self.stores:
            pair.real.close()
