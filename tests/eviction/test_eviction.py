"""Every registered eviction policy, and what is particular to ``FifoEviction``."""

from __future__ import annotations

import torch
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from mplus.eviction import EVICTION
from mplus.eviction.base import FifoEviction
from mplus.stores.base import StoreLayout
from mplus.stores.ram import RamStore
from mplus.testing import suites
from mplus.testing.drawing import draw_rows
from mplus.testing.eviction import EvictionConformance
from mplus.testing.strategies import CONFORMANCE

globals().update(suites(EvictionConformance, EVICTION))


@CONFORMANCE
@given(births=st.lists(st.integers(0, 5), min_size=1, max_size=40), data=st.data())
def test_fifo_takes_the_oldest_births_and_the_lowest_ids_among_them(births, data):
    layout = StoreLayout(layers=1, hidden_size=1)
    store = RamStore(layout)
    store.append(0, draw_rows(layout, len(births), 0).replace(birth=torch.tensor(births)))
    excess = data.draw(st.integers(1, len(births)))
    expected = sorted(range(len(births)), key=lambda row_id: (births[row_id], row_id))[:excess]
    assert FifoEviction().select(store, 0, excess).tolist() == expected


@CONFORMANCE
@given(
    births=st.lists(st.integers(0, 9), min_size=1, max_size=60),
    slab_rows=st.sampled_from([1, 3, 8]),
    data=st.data(),
)
def test_fifo_is_a_plain_sort_however_rows_lie(births, slab_rows, data):
    layout = StoreLayout(layers=1, hidden_size=1)
    store = RamStore(layout, RamStore.Options(slab_rows=slab_rows))
    numbered = draw_rows(layout, len(births), 0).replace(birth=torch.tensor(births))
    for part in range(0, len(births), 7):
        store.append(0, numbered.select(slice(part, part + 7)))
    while store.count(0):
        left = {row_id: births[row_id] for row_id in store.ids(0).tolist()}
        excess = data.draw(st.integers(1, len(left)))
        expected = sorted(left, key=lambda row_id: (left[row_id], row_id))[:excess]
        assert FifoEviction().select(store, 0, excess).tolist() == expected
        gone = data.draw(st.lists(st.sampled_from(sorted(left)), max_size=9))
        store.remove(0, torch.tensor(expected + gone))


def test_fifo_looks_only_where_old_rows_are():
    layout = StoreLayout(layers=1, hidden_size=1)
    store = RamStore(layout, RamStore.Options(slab_rows=16, expected_rows=16))
    store.append(0, draw_rows(layout, 160, 0).replace(birth=torch.arange(160) // 20 * 20))
    FifoEviction().select(store, 0, 3)
    looked = []

    class Watched(dict):
        def __getitem__(self, name):
            looked.append(name)
            return super().__getitem__(name)

    class Watching:
        layout = store.layout

        def chunks(self, layer, *names):
            return [evolve(chunk, columns=Watched(chunk.columns)) for chunk in store.chunks(layer, *names)]

    assert FifoEviction().select(Watching(), 0, 3).tolist() == [0, 1, 2]
    assert looked == ["birth"] * 2, "the first two of ten slabs have rows born at 0"
