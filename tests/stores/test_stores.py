"""Every registered store, and what is particular to ``RamStore``."""

from __future__ import annotations

import copy
import math
import pickle
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from mplus.errors import ConfigError, MemoryMismatchError
from mplus.stores import STORES
from mplus.stores.base import StoreLayout
from mplus.stores.ram import RamStore
from mplus.stores.slabs.block import Block, RamAllocator
from mplus.testing import suites
from mplus.testing.drawing import draw_rows
from mplus.testing.stores import StoreConformance
from mplus.testing.strategies import CONFORMANCE
from tests.helpers.modes import on_every_change
from tests.references.quantized import QuantizedConformance

if TYPE_CHECKING:
    from mplus.rows import MemoryRows


class TieredConformance(StoreConformance):
    """Over "mmap", whose own suite is longer; small budgets are in ``test_tiered.py``."""

    machines = 6


class OurConformance(StoreConformance):
    """Memories are followed through long lives elsewhere as well (``tests/memory/rows_machine.py``)."""

    machines = on_every_change(12, nightly=StoreConformance.machines)


SPECIAL = {
    "ram": OurConformance,
    "mmap": OurConformance,
    "quantized": QuantizedConformance,
    "tiered": TieredConformance,
}
globals().update(suites(StoreConformance, STORES, SPECIAL))


class TestRamStoreOfSmallSlabs(StoreConformance):
    """The same suite where a few rows make many slabs, of which some are joined and some rewritten."""

    implementation = RamStore
    machines = on_every_change(8, nightly=20)

    def make(self, layout: StoreLayout) -> RamStore:
        return RamStore(layout, RamStore.Options(slab_rows=4, growth=1.5))


LAYOUT = StoreLayout(layers=1, hidden_size=16, key_size=4)
ROW_BYTES = 16 * 4 + 4 * 4 + 3 * 8
"""hidden, key, and birth, source and id."""


class CountWrites(TorchDispatchMode):
    """Counts the elements of ``hidden`` that anything writes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        views = ("aten::empty", "aten::slice", "aten::detach", "aten::alias", "aten::view", "aten::as_strided")
        if isinstance(result, torch.Tensor) and result.shape[1:] == (16,) and not func.name().startswith(views):
            self.elements += result.numel()
        return result


def append(store: RamStore, count: int, seed: int = 0) -> MemoryRows:
    rows = draw_rows(LAYOUT, count, seed)
    store.append(0, rows)
    return rows


class TestCost:
    """Elements copied, so that no clock is needed."""

    def test_the_counter_sees_copies(self):
        with CountWrites() as writes:
            torch.empty(4, 16)[1:3].copy_(torch.zeros(2, 16))
            torch.zeros(4, 16)[torch.tensor([0, 1, 2])]
        assert writes.elements == 16 * (2 + 2 + 4 + 3)  # copy_ and its source, zeros, index

    @pytest.mark.parametrize("growth", [1.25, 2.0, 4.0])
    def test_appending_copies_a_constant_number_of_times(self, growth):
        store = RamStore(LAYOUT, RamStore.Options(growth=growth))
        piece = draw_rows(LAYOUT, 8, 0)
        with CountWrites() as writes:
            for _ in range(500):
                store.append(0, piece)
        per_row = writes.elements / (16 * 8 * 500)
        assert per_row <= 1 + growth / (growth - 1)

    def test_first_in_first_out_costs_what_it_touches(self):
        store = RamStore(LAYOUT)
        append(store, 1000)
        piece = draw_rows(LAYOUT, 10, 1)
        with CountWrites() as writes:
            for _ in range(1000):
                store.append(0, piece)
                store.remove(0, store.ids(0)[:10])
        assert store.count(0) == 1000
        assert writes.elements / (16 * 10 * 1000) <= 1 + 1.2
        assert store.nbytes <= 2.1 * 1000 * ROW_BYTES

    def test_removing_an_end_copies_nothing(self):
        store = RamStore(LAYOUT)
        append(store, 100)
        with CountWrites() as writes:
            store.remove(0, store.ids(0)[:30])
            store.remove(0, store.ids(0)[-20:])
        assert writes.elements == 0

    def test_memory_shrinks_with_its_rows(self):
        store = RamStore(LAYOUT)
        append(store, 1000)
        for left in (500, 250, 100, 10, 1, 0):
            store.remove(0, store.ids(0)[: store.count(0) - left])
            assert store.nbytes <= 4 * left * ROW_BYTES

    def test_snapshots_forks_and_restores_copy_nothing(self):
        store = RamStore(LAYOUT)
        append(store, 100)
        with CountWrites() as writes:
            snapshot = store.snapshot()
            fork = store.fork()
            fork.restore(snapshot)
            fork.remove(0, fork.ids(0)[:1])
        assert writes.elements == 0
        assert store.column(0, "birth").data_ptr() == snapshot.column(0, "birth").data_ptr()

    def test_one_of_two_forks_copies_once(self):
        store = RamStore(LAYOUT)
        append(store, 100)
        append(store, 20)  # room for more behind
        fork = store.fork()
        piece = draw_rows(LAYOUT, 2, 1)
        with CountWrites() as writes:
            for _ in range(3):
                store.append(0, piece)
        assert writes.elements == 3 * 2 * 16
        with CountWrites() as writes:
            for _ in range(3):
                fork.append(0, piece)
        assert writes.elements == (120 + 3 * 2) * 16


class TestSharing:
    @pytest.fixture
    def switch_often(self):
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        yield
        sys.setswitchinterval(interval)

    def test_a_snapshot_keeps_its_rows_through_everything(self):
        store = RamStore(LAYOUT)
        rows = append(store, 10)
        snapshot = store.snapshot()
        append(store, 50, seed=1)
        store.remove(0, store.ids(0)[3:40])
        append(store, 5, seed=2)
        store.restore(snapshot)
        append(store, 3, seed=3)
        torch.testing.assert_close(snapshot.gather(0, snapshot.ids(0)).hidden, rows.hidden, atol=0, rtol=0)
        assert snapshot.ids(0).tolist() == list(range(10))

    @pytest.mark.parametrize("count", [2, 4], ids=["in place", "in a larger buffer"])
    def test_a_failed_append_leaves_the_store_usable(self, monkeypatch, count):
        store = RamStore(LAYOUT)
        first = append(store, 4).select(slice(count))
        append(store, 1, seed=1)  # now there is room for 8
        before = store.gather(0, store.ids(0)).hidden
        write = Block.write

        def interrupted(self, start, columns, index=None):
            write(self, start, dict(list(columns.items())[:1]), index)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Block, "write", interrupted)
            with pytest.raises(KeyboardInterrupt):
                store.append(0, first)
        torch.testing.assert_close(store.gather(0, store.ids(0)).hidden, before)
        store.append(0, first)
        torch.testing.assert_close(store.gather(0, store.ids(0)).hidden, torch.cat([before, first.hidden]))
        assert store.ids(0).tolist() == list(range(5 + count))

    def test_two_threads_append_to_two_forks(self, switch_often):
        base = RamStore(LAYOUT)
        append(base, 40)
        append(base, 1)  # room for more behind
        for attempt in range(20):
            forks = [base.fork(), base.fork()]
            start = threading.Barrier(2)

            def work(which, forks=forks, start=start, attempt=attempt):
                start.wait()
                for step in range(30):
                    append(forks[which], 1 + (step + which) % 3, seed=1000 * which + step)

            threads = [threading.Thread(target=work, args=(which,)) for which in (0, 1)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            for which, fork in enumerate(forks):
                alone = RamStore(LAYOUT)
                append(alone, 40)
                append(alone, 1)
                for step in range(30):
                    append(alone, 1 + (step + which) % 3, seed=1000 * which + step)
                assert fork.ids(0).tolist() == alone.ids(0).tolist()
                for name, column in fork.gather(0, fork.ids(0)).columns().items():
                    expected = alone.gather(0, alone.ids(0)).columns()[name]
                    torch.testing.assert_close(column, expected, atol=0, rtol=0, msg=f"fork {which}: {name}")

    def test_only_one_of_many_threads_gets_a_place(self):
        class Hesitant(Block):
            """Lets other threads run between looking and taking."""

            @property
            def _tip(self):
                seen = self.seen
                time.sleep(1e-5)
                return seen

            @_tip.setter
            def _tip(self, value):
                self.seen = value

        buffer = Hesitant(RamAllocator(LAYOUT).allocate(50).columns)
        won, start = [], threading.Barrier(4)

        def claim():
            start.wait()
            won.extend(place for place in range(50) if buffer.claim(place, 1))

        threads = [threading.Thread(target=claim) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == len(set(won))
        assert won

    @pytest.mark.parametrize("clone", [copy.deepcopy, lambda store: pickle.loads(pickle.dumps(store))])
    def test_copies_by_copy_and_pickle_are_independent(self, clone):
        store = RamStore(LAYOUT)
        rows = append(store, 5)
        twin = clone(store)
        append(twin, 2, seed=1)
        append(store, 4, seed=2)
        assert twin.ids(0).tolist() == list(range(7))
        torch.testing.assert_close(twin.gather(0, torch.arange(5)).hidden, rows.hidden, atol=0, rtol=0)


class TestInput:
    def test_a_snapshot_of_another_layout_is_refused(self):
        store = RamStore(LAYOUT)
        append(store, 2)
        with pytest.raises(MemoryMismatchError, match="snapshot of this store"):
            store.restore(RamStore(attrs.evolve(LAYOUT, key_size=0)).snapshot())
        with pytest.raises(MemoryMismatchError, match="RamStore"):
            store.restore(store)
        assert store.count(0) == 2

    @pytest.mark.parametrize("layer", [-1, 1])
    def test_a_layer_that_does_not_exist_is_refused(self, layer):
        store = RamStore(LAYOUT)
        with pytest.raises(IndexError, match=str(layer)):
            store.append(layer, draw_rows(LAYOUT, 1, 0))
        with pytest.raises(IndexError, match=r"0\.\.0"):
            store.snapshot().ids(layer)

    @pytest.mark.parametrize("growth", [1, 0, -2, math.inf, math.nan, True, "2"])
    def test_growth_must_be_above_one(self, growth):
        with pytest.raises(ConfigError, match=r"growth must be .* above 1, got"):
            RamStore.Options(growth=growth)

    @CONFORMANCE
    @given(
        growth=st.sampled_from([1.01, 1.1, 1.5, 2, 3]), counts=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)))
    )
    def test_every_growth_bounds_the_memory(self, growth, counts):
        store = RamStore(LAYOUT, RamStore.Options(growth=growth))
        for added, removed in counts:
            append(store, added)
            assert store.nbytes <= growth**2 * store.count(0) * ROW_BYTES
            store.remove(0, store.ids(0)[:removed])
            assert store.nbytes <= growth**2 * store.count(0) * ROW_BYTES
