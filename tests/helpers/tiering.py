"""Stores with tiers of a few rows, and what is compared."""

from __future__ import annotations

import torch

from mplus.rows import MemoryRows
from mplus.stores.base import StoreLayout
from mplus.stores.ram import RamStore
from mplus.stores.tiered import TieredStore
from mplus.testing.drawing import draw_rows

SMALL_SLABS = {"name": "ram", "slab_rows": 4}
TIGHT = {"inner": SMALL_SLABS, "device_bytes": 400, "host_bytes": 1000}
LAYOUT = StoreLayout(layers=2, hidden_size=3, key_size=2)
CONTENT_BYTES = 3 * 4 + 24
"""hidden, and the labels of a place."""
SMALL_BYTES = 2 * 4 + 3 * 8
"""key, birth, source and id."""


def tiered(layout: StoreLayout = LAYOUT, **options: object) -> TieredStore:
    return TieredStore(layout, TieredStore.Options(**{**TIGHT, **options}))


def append(store: TieredStore | RamStore, count: int, seed: int = 0, layer: int = 0) -> torch.Tensor:
    return store.append(layer, draw_rows(store.layout, count, seed))


def assert_same(one: MemoryRows, other: MemoryRows) -> None:
    """Bit for bit."""
    assert one.columns().keys() == other.columns().keys()
    for name, column in one.columns().items():
        assert torch.equal(column, other.columns()[name]), name
