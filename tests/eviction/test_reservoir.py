"""The reservoir looks at few rows, and picks what sorting all of them would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mplus.eviction import reservoir
from mplus.eviction.reservoir import ReservoirEviction, scramble, scrambled
from mplus.stores.base import StoreLayout
from mplus.stores.mmap import MmapStore
from mplus.stores.ram import RamStore
from mplus.testing.drawing import draw_rows
from mplus.testing.strategies import CONFORMANCE

LAYOUT = StoreLayout(layers=1, hidden_size=1)
STORES: list[Any] = [
    lambda: RamStore(LAYOUT),
    lambda: RamStore(LAYOUT, RamStore.Options(slab_rows=1)),
    lambda: RamStore(LAYOUT, RamStore.Options(slab_rows=5, growth=1.5)),
    lambda: MmapStore(LAYOUT, MmapStore.Options(bytes_in_memory=400)),
]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["append", "append", "evict", "evict", "remove", "back", "fork"]),
        st.integers(1, 12),
        st.integers(0, 2**16),
    ),
    max_size=25,
)


def sorted_out(store: Any, excess: int, seed: int) -> list[int]:
    """The rows with the largest numbers, the lowest ids first where they are equal; ascending."""
    rows = store.gather(0, store.ids(0))
    drawn = scramble(scramble(rows.birth ^ scrambled(scrambled(seed))) ^ rows.source).tolist()
    order = sorted(zip([-number for number in drawn], store.ids(0).tolist(), strict=True))
    return sorted(row_id for _, row_id in order[:excess])


@pytest.mark.parametrize("make", STORES, ids=["ram", "slabs of 1", "slabs of 5", "mmap"])
@pytest.mark.parametrize("least", [1, 4, 64])
@CONFORMANCE
@given(steps=STEPS, births=st.sampled_from([2, 100]), seed=st.integers(0, 2))
def test_as_sorting_all_rows(make, least, steps, births, seed):
    """However rows came and went, with equal numbers among them or not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reservoir, "MIN_CANDIDATES", least)
        patch.setattr(reservoir, "SPARE_FACTOR", 1)
        policy = ReservoirEviction(ReservoirEviction.Options(seed=seed))
        stores = [make()]
        snapshot = stores[0].snapshot()
        for what, count, number in steps:
            store = stores[number % len(stores)]
            present = store.ids(0)
            if what == "append":
                rows = draw_rows(LAYOUT, count, number)
                store.append(0, rows.replace(birth=rows.birth % births))
            elif what == "evict" and len(present):
                excess = min(count, len(present))
                chosen = policy.select(store, 0, excess)
                assert chosen.tolist() == sorted_out(store, excess, seed)
                if number % 4:
                    store.remove(0, chosen)
            elif what == "remove" and len(present):
                store.remove(0, present[number % len(present) :][:count])
            elif what == "back" and number % 2:
                stores[0].restore(snapshot)
            elif what == "back":
                snapshot = stores[0].snapshot()
            elif what == "fork" and len(stores) < 3:
                stores.append(store.fork())


@pytest.mark.parametrize("make", [STORES[0], STORES[3]], ids=["ram", "mmap"])
def test_numbers_are_computed_for_new_rows(make, monkeypatch):
    """A thousand rows were looked at when the first left; then those that come, and seldom any others."""
    computed: list[int] = []

    def counting(values: torch.Tensor) -> torch.Tensor:
        if values.dim():
            computed.append(len(values))
        return scramble(values)

    store, policy = make(), ReservoirEviction()
    rows = draw_rows(LAYOUT, 1000, 0)
    store.append(0, rows.replace(birth=torch.arange(1000)))
    policy.select(store, 0, 4)
    monkeypatch.setattr(reservoir, "scramble", counting)
    for turn in range(10):
        birth = torch.arange(1000 + 4 * turn, 1004 + 4 * turn)
        store.append(0, draw_rows(LAYOUT, 4, turn).replace(birth=birth))
        store.remove(0, policy.select(store, 0, 4))
    assert store.count(0) == 1000
    assert 2 * 4 * 10 <= sum(computed) <= 2 * 20 * 10, "twice for each row: once by birth, once by source"
