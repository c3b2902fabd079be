"""Every registered eviction policy, and what is particular to ``FifoEviction``."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from mplus.stores import EVICTION
from mplus.stores.base import StoreLayout
from mplus.stores.eviction import FifoEviction
from mplus.stores.ram import RamStore
from mplus.testing.eviction import EvictionConformance
from mplus.testing.registered import suites
from mplus.testing.strategies import CONFORMANCE, draw_rows

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
