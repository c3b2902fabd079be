"""A store and waiting rows, seen as one, against plain lists."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from mplus.mechanisms.short_term.pending import PendingView
from mplus.rows import MemoryRows
from mplus.stores.base import StoreLayout
from mplus.stores.ram import RamStore
from mplus.testing.drawing import draw_rows
from mplus.testing.strategies import CONFORMANCE

LAYOUT = StoreLayout(layers=1, hidden_size=3, key_size=2, expiry=True)


@CONFORMANCE
@given(
    count=st.integers(0, 20),
    waiting=st.integers(0, 5),
    gone=st.lists(st.integers(0, 19), max_size=12),
    data=st.data(),
)
def test_rows_are_those_of_the_store_and_then_those_that_wait(count, waiting, gone, data):
    store = RamStore(LAYOUT, RamStore.Options(slab_rows=4))
    store.append(0, draw_rows(LAYOUT, count, 1))
    store.remove(0, torch.tensor([place for place in gone if place < count], dtype=torch.int64))
    pending = draw_rows(LAYOUT, waiting, 2).replace(expiry=None)
    view = PendingView(store, [pending])
    expected = MemoryRows.cat([store.gather(0, store.ids(0)).replace(expiry=None), pending])
    total = len(expected)
    assert view.ids(0).tolist() == list(range(total))
    chunks = view.chunks(0, "key", "hidden")
    live = [slice(None) if chunk.live is None else chunk.live for chunk in chunks]
    assert torch.cat([chunk.ids[where] for chunk, where in zip(chunks, live, strict=True)]).tolist() == list(
        range(total)
    )
    for name in ("key", "hidden"):
        found = torch.cat([chunk.columns[name][where] for chunk, where in zip(chunks, live, strict=True)])
        assert torch.equal(found, expected.columns()[name])
    places = torch.tensor(
        data.draw(st.lists(st.integers(0, total - 1), max_size=9)) if total else [], dtype=torch.int64
    )
    for leave_out in ((), ("hidden", "key")):
        found = view.gather(0, places, leave_out)
        assert found.columns().keys() == expected.columns().keys() - set(leave_out)
        for name, column in found.columns().items():
            assert torch.equal(column, expected.columns()[name][places])
