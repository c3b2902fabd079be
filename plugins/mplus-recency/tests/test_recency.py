"""The recency retriever behaves as every retriever must, and picks the newest rows."""

from __future__ import annotations

import torch
from mplus_recency import RecencyRetriever

from mplus.retrievers import RETRIEVERS, RetrieverShape
from mplus.stores import MemoryRows, StoreLayout
from mplus.stores.ram import RamStore
from mplus.testing.retrievers import RetrieverConformance


class TestConformance(RetrieverConformance):
    implementation = RecencyRetriever


def store_of(*births: int) -> tuple[RamStore, list[int]]:
    """A store with one row per birth, and the ids of these rows."""
    store = RamStore(StoreLayout(layers=1, hidden_size=2))
    birth = torch.tensor(births, dtype=torch.int64)
    ids = store.append(0, MemoryRows(torch.zeros(len(births), 2), birth, torch.zeros_like(birth)))
    return store, ids.tolist()


def test_installed_under_its_name() -> None:
    assert RETRIEVERS.get("recency") is RecencyRetriever


def test_picks_the_newest_rows_of_each_store() -> None:
    retriever = RecencyRetriever(RetrieverShape(layers=1, hidden_size=2))
    one, ids_one = store_of(5, 9, 2, 9, 7)
    two, ids_two = store_of(1)
    queries, mask = torch.zeros(2, 3, 0), torch.ones(2, 3, dtype=torch.bool)
    first, second = retriever.select(0, queries, mask, [one, two], 3)
    assert first.ids.tolist() == [ids_one[1], ids_one[3], ids_one[4]]
    assert first.scores.tolist() == [9.0, 9.0, 7.0]
    assert second.ids.tolist() == ids_two
    assert list(retriever.parameters()) == []
