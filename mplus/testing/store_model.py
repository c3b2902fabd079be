"""What a store must hold: comparisons with rows, a model of Python lists, and a machine that drives both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from attrs import Factory, define, field
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from mplus.rows import MemoryRows
from mplus.stores.base import Column, Content, MemoryStore, StoreLayout, StoreView
from mplus.testing.drawing import draw_rows
from mplus.testing.strategies import sizes

LAYOUT = StoreLayout(layers=2, hidden_size=3, key_size=2, expiry=True, transposed_keys=True)
COLUMNS: tuple[Column, ...] = ("birth", "source", "key", "expiry")
CONTENT: tuple[Content, ...] = ("hidden", "projected")


class StoreChecks:
    """The comparisons of ``StoreConformance``, for tests of its subclasses, too.

    Attributes:
        hidden_tolerance, key_tolerance: largest absolute error of values of size about 1, for stores that compress.
    """

    hidden_tolerance: ClassVar[float] = 0.0
    key_tolerance: ClassVar[float] = 0.0

    def expected(self, rows: MemoryRows) -> MemoryRows:
        """Return what these rows read back as; stores that compress say here what they make of them."""
        return rows

    def check_column(self, name: str, actual: Tensor | None, expected: Tensor | None) -> None:
        """Raise AssertionError unless a column is what was stored, within the tolerances."""
        if expected is None:
            assert actual is None, f"a layout without {name!r} has no such column"
            return
        assert actual is not None, f"column {name!r} is missing"
        tolerance = {"hidden": self.hidden_tolerance, "key": self.key_tolerance}.get(name, 0.0)
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0, msg=lambda m: f"column {name!r}: {m}")

    def check_rows(self, actual: MemoryRows, expected: MemoryRows) -> None:
        """Raise AssertionError unless ``actual`` are what ``expected`` reads back as, within the tolerances."""
        self._compare(actual, self.expected(expected))

    def _compare(self, actual: MemoryRows, expected: MemoryRows) -> None:
        found, wanted = actual.columns(), expected.columns()
        for name in ("hidden", "projected", *COLUMNS, *expected.extra, *actual.extra):
            self.check_column(name, found.get(name), wanted.get(name))

    def check_layer(self, view: StoreView, layer: int, expected: list[tuple[int, MemoryRows]]) -> None:
        """Raise AssertionError unless a layer holds exactly these rows under these ids, in this order."""
        ids = view.ids(layer)
        assert ids.dtype == torch.int64
        assert ids.tolist() == [row_id for row_id, _ in expected]
        assert view.count(layer) == len(expected)
        empty = draw_rows(view.layout, 0, 0)
        rows = self.expected(MemoryRows.cat([empty, *(row for _, row in expected)]))
        for name in cast("tuple[Column, ...]", (*COLUMNS, *rows.extra)):
            self.check_column(name, view.column(layer, name), rows.columns().get(name))
        self.check_column("key", view.keys(layer), rows.key)
        self._compare(view.gather(layer, ids), rows)
        self.check_pieces(view, layer, ids, rows)

    def check_pieces(self, view: StoreView, layer: int, ids: Tensor, rows: MemoryRows) -> None:
        """Raise AssertionError unless chunks hold these rows under these ids."""
        names = tuple(rows.columns())
        parts: dict[str, list[Tensor]] = {"id": [], **{name: [] for name in names}}
        newest = -1
        for chunk in view.chunks(layer, *cast("Any", names)):
            every = chunk.ids.tolist()
            assert every == sorted(set(every)), "ids of a chunk ascend"
            assert not every or every[0] > newest, "ids ascend from chunk to chunk"
            newest = every[-1] if every else newest
            for name, column in {"id": chunk.ids, **chunk.columns}.items():
                parts[name].append(column if chunk.live is None else column[chunk.live])
        assert [row_id for part in parts.pop("id") for row_id in part.tolist()] == ids.tolist()
        for name, found in parts.items():
            self.check_column(name, torch.cat(found) if found else rows.columns()[name][:0], rows.columns()[name])

    def check_located(self, view: StoreView, layer: int, ids: Tensor, rows: MemoryRows) -> None:
        """Raise AssertionError unless content that is found where it lies is that of these rows."""
        for name in CONTENT:
            located = view.locate(layer, name, ids) if len(ids) and name in rows.columns() else None
            if located is not None:
                column, places = located.contiguous()
                self.check_column(name, column[places], rows.columns()[name])

    def check_all(self, view: StoreView, expected: MemoryRows, ids: Tensor, layer: int = 0) -> None:
        """Check a layer as ``check_layer`` does, from rows and ids."""
        single = [expected.select(slice(place, place + 1)) for place in range(len(expected))]
        self.check_layer(view, layer, list(zip(ids.tolist(), single, strict=True)))


@define
class ModelLayer:
    """Rows of one layer as ``(id, one row)`` and the largest id ever given."""

    rows: list[tuple[int, MemoryRows]] = Factory(list)
    last: int = -1

    def copy(self) -> ModelLayer:
        """Return an independent list of the same rows."""
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
