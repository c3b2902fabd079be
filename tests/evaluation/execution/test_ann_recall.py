"""What a shortcut costs: counted by hand."""

from __future__ import annotations

import torch

from mplus.evaluation.execution.ann_recall import MOST, Shortcuts
from mplus.retrievers.base import Retriever, RetrieverShape, Selection
from mplus.retrievers.faiss_ivf import FaissIvfRetriever
from mplus.retrievers.linear import LinearRetriever
from mplus.retrievers.random import RandomRetriever
from mplus.stores.base import StoreLayout
from mplus.stores.ram import RamStore
from mplus.testing.drawing import draw_rows

SHAPE = RetrieverShape(layers=2, hidden_size=4)


class Oldest(Retriever):
    """Always the first rows."""

    name = "oldest"

    def select(self, layer, queries, query_mask, stores, k):
        return [Selection(store.ids(layer)[:k], torch.zeros(min(k, store.count(layer)))) for store in stores]


def filled(retriever, count):
    layout = StoreLayout(layers=2, hidden_size=4, key_size=retriever.key_size)
    store = RamStore(layout)
    for layer in range(2):
        rows = draw_rows(layout, count, layer)
        store.append(layer, rows.replace(key=retriever.project_keys(layer, rows.hidden).detach()))
    return store


def asked(shortcuts, store, times=1):
    generator = torch.Generator().manual_seed(0)
    for _ in range(times):
        hidden = torch.randn(1, 3, 4, generator=generator)
        shortcuts.ask(1, hidden, torch.ones(1, 3, dtype=torch.bool), dict.fromkeys(shortcuts.retrievers, store))
    return shortcuts.plain()


def test_overlap_is_that_of_the_best_by_the_own_score():
    own = LinearRetriever(SHAPE, LinearRetriever.Options(width=4))
    store, shortcuts = filled(own, 10), Shortcuts(own, {"own": own, "oldest": Oldest(SHAPE)}, 4, 2)
    found = asked(shortcuts, store)
    hidden = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
    scores = own.project_queries(1, hidden)[0].mean(0) @ store.keys(1).T
    best = scores.argsort(descending=True)[:4]
    assert found["own"]["overlap_with_exact_by_layer"] == [None, 1.0]
    assert found["oldest"]["overlap_with_exact_by_layer"] == [None, int((best < 4).sum()) / 4]
    for one in found.values():
        nothing, taken = one["select_ms_by_layer"]
        assert nothing is None
        assert taken > 0


def test_an_index_is_named_and_few_queries_are_enough():
    own = LinearRetriever(SHAPE, LinearRetriever.Options(width=4))
    indexed = FaissIvfRetriever(SHAPE, FaissIvfRetriever.Options(width=4, least=8, cells=4, probes=1))
    indexed.load_state_dict(own.state_dict())
    shortcuts = Shortcuts(own, {"own": own, "indexed": indexed}, 4, 2)
    found = asked(shortcuts, filled(own, 60), MOST + 3)
    assert found["indexed"]["index_by_layer"] == [{}, {"rows": 60, "cells": 4, "trained_on": 60, "added": 60}]
    assert found["own"]["index_by_layer"] == [{}, {}]
    assert shortcuts._asked == [0, MOST]
    assert 0.3 < found["indexed"]["overlap_with_exact_by_layer"][1] < 1


def test_without_a_score_there_is_nothing_to_compare_with():
    own = RandomRetriever(SHAPE)
    store = RamStore(StoreLayout(layers=2, hidden_size=4))
    store.append(1, draw_rows(store.layout, 9, 0))
    found = asked(Shortcuts(own, {"own": own}, 4, 2), store)
    assert found["own"]["overlap_with_exact_by_layer"] == [None, None]
    assert found["own"]["select_ms_by_layer"][1] > 0
