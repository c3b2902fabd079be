"""Stores of one layer with given keys, and retrievers that read them."""

from __future__ import annotations

import torch

from mplus.retrievers.base import RetrieverShape
from mplus.retrievers.faiss_ivf import FaissIvfRetriever
from mplus.stores.base import StoreLayout
from mplus.stores.ram import RamStore
from mplus.testing.strategies import draw_rows

WIDTH = 8
ONE = RetrieverShape(layers=1, hidden_size=1)
LAYOUT = StoreLayout(layers=1, hidden_size=1, key_size=WIDTH)


def store_of(keys, store=RamStore, layout=LAYOUT):
    made = store(layout)
    append(made, keys)
    return made


def append(store, keys):
    return store.append(0, draw_rows(store.layout, len(keys), 0).replace(key=keys.to(store.layout.dtype)))


def made(kind=FaissIvfRetriever, **options):
    return kind(ONE, kind.Options(width=WIDTH, **options))


def normal(count, seed=0, width=WIDTH):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def select(retriever, view, k, text=None):
    text = normal(3, 99) if text is None else text
    mask = torch.ones(1, text.shape[0], dtype=torch.bool)
    return retriever.select(0, text[None], mask, [view], k)[0]
