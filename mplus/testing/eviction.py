"""What every ``EvictionPolicy`` must do."""

from __future__ import annotations

from typing import ClassVar

import attrs
import torch
from hypothesis import given
from hypothesis import strategies as st

from mplus.eviction.base import EvictionPolicy
from mplus.stores.base import MemoryStore, StoreLayout
from mplus.stores.ram import RamStore
from mplus.testing.drawing import draw_rows
from mplus.testing.strategies import CONFORMANCE, layouts, sizes


class EvictionConformance:
    """Subclass it in a test module and set ``implementation``, or override ``make`` and ``make_store``.

    Attributes:
        implementation: the policy class under test.
    """

    implementation: ClassVar[type[EvictionPolicy]]

    def make(self) -> EvictionPolicy:
        """Return a new policy."""
        policy = self.implementation()
        assert isinstance(policy, EvictionPolicy)
        return policy

    def make_store(self, layout: StoreLayout) -> MemoryStore:
        """Return an empty store to evict from."""
        return RamStore(layout)

    def fill(self, layout: StoreLayout, count: int, seed: int) -> MemoryStore:
        """Return a store with ``count`` rows in its last layer, with a gap in the ids."""
        store = self.make_store(layout)
        ids = store.append(layout.layers - 1, draw_rows(layout, count + 1, seed))
        store.remove(layout.layers - 1, ids[count // 2 : count // 2 + 1])
        return store

    def test_has_a_name_and_options(self) -> None:
        assert isinstance(self.implementation.name, str)
        assert self.implementation.name
        assert attrs.has(self.implementation.Options)
        assert isinstance(self.make().options, self.implementation.Options)

    @CONFORMANCE
    @given(layout=layouts(expiry=True), count=sizes(12, 1), data=st.data(), seed=st.integers(0, 2**16))
    def test_chooses_exactly_the_excess(self, layout: StoreLayout, count: int, data: st.DataObject, seed: int) -> None:
        store, layer = self.fill(layout, count, seed), layout.layers - 1
        excess = data.draw(sizes(count, 1))
        present, rows = store.ids(layer).clone(), store.gather(layer, store.ids(layer))
        chosen = self.make().select(store, layer, excess)
        assert chosen.dtype == torch.int64
        assert chosen.shape == (excess,)
        assert len(set(chosen.tolist())) == excess
        assert set(chosen.tolist()) <= set(present.tolist())
        assert store.ids(layer).tolist() == present.tolist(), "choosing removes nothing"
        for name, column in store.gather(layer, present).columns().items():
            assert torch.equal(column, rows.columns()[name]), name
        store.remove(layer, chosen)
        assert store.count(layer) == count - excess

    @CONFORMANCE
    @given(count=sizes(12, 1), data=st.data(), seed=st.integers(0, 2**16))
    def test_equal_stores_lose_the_same_rows(self, count: int, data: st.DataObject, seed: int) -> None:
        layout = StoreLayout(layers=1, hidden_size=2, expiry=True)
        store, excess = self.fill(layout, count, seed), data.draw(sizes(count, 1))
        chosen = self.make().select(store, 0, excess).tolist()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(9)
            state = torch.get_rng_state()
            for view in (store, store.snapshot(), store.fork(), self.fill(layout, count, seed)):
                assert self.make().select(view, 0, excess).tolist() == chosen
            assert torch.equal(torch.get_rng_state(), state), "the global generator was used"

    @CONFORMANCE
    @given(layout=layouts(expiry=True), count=sizes(12, 1), spare=sizes(12), seed=st.integers(0, 2**16))
    def test_a_merge_expires_rows_that_are_there(self, layout: StoreLayout, count: int, spare: int, seed: int) -> None:
        store, layer, policy = self.fill(layout, count, seed), layout.layers - 1, self.make()
        present, elapsed = store.ids(layer).tolist(), 4.0
        after, gone = policy.expire(store, layer, elapsed, spare)
        assert gone.dtype == torch.int64
        assert set(gone.tolist()) <= set(present)
        assert len(set(gone.tolist())) == len(gone)
        assert store.ids(layer).tolist() == present, "choosing removes nothing"
        if policy.lifetime is None:
            assert (after, len(gone)) == (elapsed, 0), "rows without a lifetime do not expire"
        elif len(gone):
            assert count - len(gone) > spare
            assert after >= elapsed
