"""What every ``MemoryStore`` must do."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import ClassVar

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test

from mplus.rows import MemoryRows
from mplus.stores.base import MemoryStore, StoreLayout, StoreView
from mplus.testing.drawing import draw_rows
from mplus.testing.store_model import LAYOUT, StoreChecks, StoreMachine
from mplus.testing.strategies import CONFORMANCE, layouts

WITH_EXTRA = attrs.evolve(
    LAYOUT,
    projected_size=2,
    extra=(("label", (), torch.int64), ("note", (2,), torch.float32), ("hidden_mark", (3,), torch.int16)),
)
"""Rows that also have columns of a store around this one, which keeps rows in a form of its own."""


class StoreConformance(StoreChecks):
    """Subclass it in a test module and set ``implementation``, or override ``make``.

    Attributes:
        implementation: the store class under test.
        machines: sequences of changes that are compared with a plain list.
    """

    implementation: ClassVar[type[MemoryStore]]
    machines: ClassVar[int] = CONFORMANCE.max_examples

    def make(self, layout: StoreLayout) -> MemoryStore:
        """A new, empty store."""
        store = self.implementation(layout)
        assert isinstance(store, MemoryStore)
        return store

    # ------------------------------------------------------------------ the tests

    def test_has_a_name_and_options(self) -> None:
        assert isinstance(self.implementation.name, str)
        assert self.implementation.name
        assert attrs.has(self.implementation.Options)
        store = self.make(LAYOUT)
        assert store.layout == LAYOUT
        assert isinstance(store.options, self.implementation.Options)

    @CONFORMANCE
    @given(layout=layouts())
    def test_new_store_is_empty(self, layout: StoreLayout) -> None:
        store = self.make(layout)
        for layer in range(layout.layers):
            self.check_layer(store, layer, [])
            self.check_layer(store.snapshot(), layer, [])

    @CONFORMANCE
    @given(layout=layouts(), data=st.data())
    def test_rows_come_back_in_any_order_and_repeated(self, layout: StoreLayout, data: st.DataObject) -> None:
        store, rows = self.make(layout), draw_rows(layout, 7, 1)
        ids = torch.cat([store.append(0, rows.select(slice(0, 3))), store.append(0, rows.select(slice(3, 7)))])
        self.check_all(store, rows, ids)
        places = torch.tensor(data.draw(st.lists(st.integers(0, 6), max_size=12)), dtype=torch.int64)
        for view in (store, store.snapshot()):
            self.check_rows(view.gather(0, ids[places]), rows.select(places))
            self.check_located(view, 0, ids[places], self.expected(rows.select(places)))

    def test_follows_a_model_through_any_sequence_of_changes(self) -> None:
        suite = self

        class Machine(StoreMachine):
            def __init__(self) -> None:
                super().__init__(suite.make, suite.check_layer)

        run_state_machine_as_test(
            Machine, settings=settings(CONFORMANCE, max_examples=self.machines, stateful_step_count=25)
        )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    def test_keeps_every_dtype(self, dtype: torch.dtype) -> None:
        layout = attrs.evolve(LAYOUT, dtype=dtype)
        store, rows = self.make(layout), draw_rows(layout, 5, 1)
        ids = store.append(1, rows)
        self.check_all(store, rows, ids, layer=1)
        gathered = store.gather(1, ids)
        assert gathered.need_hidden().dtype == dtype
        assert gathered.key is not None
        assert gathered.key.dtype == dtype

    def test_columns_of_a_store_around_it_come_back(self) -> None:
        """``StoreLayout.extra``: kept as they are, through every change, copy and way of reading."""
        store, rows = self.make(WITH_EXTRA), draw_rows(WITH_EXTRA, 6, 1)
        ids = torch.cat([store.append(0, rows.select(slice(0, 2))), store.append(0, rows.select(slice(2, 6)))])
        store.remove(0, ids[1:2])
        kept = torch.tensor([0, 2, 3, 4, 5])
        left, ids = rows.select(kept), ids[kept]
        snapshot, fork = store.snapshot(), store.fork()
        store.append(0, draw_rows(WITH_EXTRA, 2, 2))
        for view in (snapshot, fork):
            self.check_all(view, left, ids)
        store.restore(snapshot)
        self.check_all(store, left, ids)
        places = torch.tensor([3, 0, 3])
        narrow = store.gather(0, ids[places], leave_out=("hidden", "projected", "key"))
        for name, column in left.select(places).extra.items():
            self.check_column(name, narrow.extra.get(name), column)
        self.check_located(store, 0, ids[places], self.expected(left.select(places)))
        moved = store.to(dtype=torch.bfloat16)
        assert moved.layout.extra == WITH_EXTRA.extra
        for name, column in moved.gather(0, ids).extra.items():
            self.check_column(name, column, left.extra[name])
        moved.append(0, draw_rows(moved.layout, 1, 3))
        lacking = draw_rows(WITH_EXTRA, 2, 2)
        lacking = lacking.replace(extra={name: lacking.extra[name] for name in ("note", "hidden_mark")})  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"\w"):
            store.append(0, lacking)
        self.check_all(store, left, ids)

    def test_layers_are_independent(self) -> None:
        store, rows = self.make(LAYOUT), draw_rows(LAYOUT, 4, 1)
        ids = store.append(0, rows)
        assert store.count(1) == 0
        other = store.append(1, rows.select(slice(2, 4)))
        store.remove(1, other[:1])
        self.check_all(store, rows, ids)
        self.check_all(store, rows.select(slice(3, 4)), other[1:], layer=1)

    @pytest.mark.parametrize("ends", [[], [5], [0, 5]], ids=["empty", "some rows", "an old row gone"])
    def test_a_missing_id_is_named(self, ends: list[int]) -> None:
        store = self.make(LAYOUT)
        rows = draw_rows(LAYOUT, ends[-1] if ends else 0, 1)
        ids = store.append(0, rows)
        missing = 987_654
        if len(ends) == 2:
            missing = int(ids[2])
            store.remove(0, ids[2:3])
        before = store.ids(0).clone()
        wanted = torch.cat([before, torch.tensor([missing])])
        for view in (store, store.snapshot()):
            with pytest.raises(KeyError, match=str(missing)):
                view.gather(0, wanted)
        with pytest.raises(KeyError, match=str(missing)):
            store.remove(0, wanted)
        with pytest.raises(KeyError, match="-3"):
            store.gather(0, torch.tensor([-3]))
        assert store.ids(0).tolist() == before.tolist(), "a refused removal removes nothing"

    @pytest.mark.parametrize(
        "broken",
        [
            lambda rows: rows.replace(key=None),
            lambda rows: rows.replace(expiry=None),
            lambda rows: rows.replace(hidden=rows.hidden[:, :-1]),
            lambda rows: rows.replace(key=torch.cat([rows.key, rows.key], 1)),
            lambda rows: rows.replace(hidden=rows.hidden.half()),
            lambda rows: rows.replace(birth=rows.birth.int()),
            lambda rows: rows.replace(source=rows.source[:-1]),
        ],
        ids=["no key", "no expiry", "narrow hidden", "wide key", "half hidden", "int32 birth", "short source"],
    )
    def test_rows_of_another_layout_are_refused(self, broken: Callable[[MemoryRows], MemoryRows]) -> None:
        store, rows = self.make(LAYOUT), draw_rows(LAYOUT, 4, 1)
        ids = store.append(0, rows)
        with pytest.raises(ValueError, match=r"\w"):
            store.append(0, broken(draw_rows(LAYOUT, 3, 2)))
        self.check_all(store, rows, ids)

    def test_superfluous_columns_are_refused(self) -> None:
        store = self.make(attrs.evolve(LAYOUT, key_size=0, expiry=False))
        for layout in (attrs.evolve(LAYOUT, expiry=False), attrs.evolve(LAYOUT, key_size=0)):
            with pytest.raises(ValueError, match=r"\w"):
                store.append(0, draw_rows(layout, 3, 1))
        assert store.count(0) == 0

    def test_appending_copies_and_forgets_how_rows_were_computed(self) -> None:
        store, rows = self.make(LAYOUT), draw_rows(LAYOUT, 4, 1)
        weight = torch.ones(1, requires_grad=True)
        source = MemoryRows.of({name: column.clone() for name, column in rows.columns().items()})
        ids = store.append(0, source.replace(hidden=source.need_hidden() * weight))
        more = store.append(0, source)
        for column in source.columns().values():
            column.zero_()
        self.check_all(store, MemoryRows.cat([rows, rows]), torch.cat([ids, more]))
        gathered, keys = store.gather(0, ids), store.keys(0)
        assert keys is not None
        assert not any(column.requires_grad for column in (*gathered.columns().values(), keys))

    @pytest.mark.parametrize("present", range(1, 10))
    def test_what_was_handed_out_survives_later_changes_in_autograd(self, present: int) -> None:
        store, row = self.make(LAYOUT), draw_rows(LAYOUT, 1, 1)
        for _ in range(present):
            store.append(0, row)
        keys = store.snapshot().keys(0)
        assert keys is not None
        query = torch.ones(2, requires_grad=True)
        loss = (keys @ query).square().sum()
        store.append(0, row)
        (gradient,) = torch.autograd.grad(loss, query)
        torch.testing.assert_close(gradient, 2 * keys.T @ keys @ query)

    def test_inference_mode_leaves_no_trace(self) -> None:
        store, rows = self.make(LAYOUT), draw_rows(LAYOUT, 4, 1)
        with torch.inference_mode():
            inside = draw_rows(LAYOUT, 4, 1)
            ids = store.append(0, inside)
            store.append(0, inside)
            store.remove(0, ids[1:2])
            store.fork().append(0, inside)
        query = torch.ones(2, requires_grad=True)
        for _ in range(2):
            keys = store.keys(0)
            assert keys is not None
            (gradient,) = torch.autograd.grad((keys @ query).square().sum(), query)
            torch.testing.assert_close(gradient, 2 * keys.T @ keys @ query)
            store.append(0, rows)
        self.check_all(store, rows.select(torch.tensor([0, 2, 3, *(0, 1, 2, 3) * 3])), store.ids(0))

    @pytest.mark.parametrize("present", range(10))
    def test_forks_and_restored_stores_go_their_own_ways(self, present: int) -> None:
        store, row = self.make(LAYOUT), draw_rows(LAYOUT, 1, 1)
        for _ in range(present):
            store.append(0, row)
        snapshot, first, second = store.snapshot(), store.fork(), store.fork()
        first.append(0, draw_rows(LAYOUT, 1, 2))
        second.append(0, draw_rows(LAYOUT, 2, 3))
        store.append(0, draw_rows(LAYOUT, 1, 4))
        before = store.snapshot()
        store.restore(snapshot)
        store.append(0, draw_rows(LAYOUT, 1, 5))
        for view, seeds in (
            (first, [(1, 2)]),
            (second, [(2, 3)]),
            (before, [(1, 4)]),
            (store, [(1, 5)]),
            (snapshot, []),
        ):
            new = [draw_rows(LAYOUT, count, seed) for count, seed in seeds]
            rows = MemoryRows.cat([draw_rows(LAYOUT, 0, 0), *[row] * present, *new])
            self.check_all(view, rows, view.ids(0))

    def test_ids_are_not_given_again_after_everything_left(self) -> None:
        store, rows = self.make(LAYOUT), draw_rows(LAYOUT, 4, 1)
        first = store.append(0, rows)
        store.remove(0, first.flip(0))
        self.check_layer(store, 0, [])
        assert int(store.append(0, rows).min()) > int(first.max())

    def test_appending_nothing_changes_nothing(self) -> None:
        store, rows = self.make(LAYOUT), draw_rows(LAYOUT, 3, 1)
        ids = store.append(0, rows)
        assert store.append(0, draw_rows(LAYOUT, 0, 2)).tolist() == []
        store.remove(0, torch.empty(0, dtype=torch.int64))
        self.check_all(store, rows, ids)

    def test_an_index_of_its_rows_knows_when_it_is_out_of_date(self) -> None:
        """Views of one identity with one revision hold the same rows, and a greater revision is a later moment."""
        store, rows = self.make(LAYOUT), draw_rows(LAYOUT, 5, 1)
        views: list[StoreView] = [store.snapshot()]
        store.append(0, rows)
        views.append(store.snapshot())
        store.remove(0, store.ids(0)[2:3])
        views.append(store.snapshot())
        store.restore(views[1])
        views.append(store.snapshot())
        store.remove(0, store.ids(0)[1:2])
        views.append(store.snapshot())
        for view in views:
            assert view.identity is store.identity
        assert store.fork().identity is None or store.fork().identity is not store.identity
        if store.identity is not None:
            assert weakref.ref(store.identity)() is store.identity
        revisions = [view.revision(0) for view in views]
        if revisions[0] is None:
            assert revisions == [None] * len(views)
            return
        known = [revision for revision in revisions if revision is not None]
        assert known == sorted(set(known))
        assert len(known) == len(views)
        assert store.revision(0) == known[-1]
        assert store.revision(1) == store.snapshot().revision(1)

    def test_another_dtype_is_another_store(self) -> None:
        store, rows = self.make(LAYOUT), draw_rows(LAYOUT, 5, 1)
        store.append(0, rows)
        store.remove(0, store.ids(0)[1:2])
        left, ids = rows.select(torch.tensor([0, 2, 3, 4])), store.ids(0).clone()
        moved = store.to(dtype=torch.bfloat16)
        assert moved.layout == attrs.evolve(LAYOUT, dtype=torch.bfloat16)
        assert store.layout == LAYOUT
        assert moved.ids(0).tolist() == ids.tolist()
        hidden = moved.gather(0, ids).need_hidden()
        torch.testing.assert_close(
            hidden,
            self.expected(left).need_hidden().bfloat16(),
            atol=self.hidden_tolerance,
            rtol=2**-7 if self.hidden_tolerance else 0,
        )
        more = moved.append(0, draw_rows(moved.layout, 2, 3))
        assert int(more.min()) > int(ids.max())
        self.check_all(store, left, ids)
        same = store.to("cpu")
        self.check_all(same, left, ids)
        same.append(0, rows)
        self.check_all(store, left, ids)

    def test_readers_know_a_store_from_others_by_its_identity(self) -> None:
        store = self.make(LAYOUT)
        store.append(0, draw_rows(LAYOUT, 2, 1))
        snapshot, fork = store.snapshot(), store.fork()
        if store.identity is None:
            return  # ids are not kept under anything
        assert snapshot.identity is store.identity
        assert fork.identity is not store.identity
        identity = store.identity
        store.append(0, draw_rows(LAYOUT, 2, 2))
        store.restore(snapshot)
        assert store.identity is identity

    def test_reports_its_size(self) -> None:
        store = self.make(LAYOUT)
        assert isinstance(store.nbytes, int)
        store.append(0, draw_rows(LAYOUT, 100, 1))
        assert store.nbytes > 0

    def test_closing_twice_is_harmless(self) -> None:
        store = self.make(LAYOUT)
        store.append(0, draw_rows(LAYOUT, 2, 1))
        store.close()
        store.close()
