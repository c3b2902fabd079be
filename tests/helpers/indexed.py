"""Stores of one layer with given keys, and retrievers that read them."""

from __future__ import annotations

import torch

from mplus.retrievers.base import RetrieverShape
from mplus.retrievers.faiss_ivf import FaissIvfRetriever
from mplus.retrievers.scores import SCORES
from mplus.stores.base import StoreLayout
from mplus.stores.ram import RamStore
from mplus.testing.drawing import draw_rows
from mplus.testing.retrievers import exact_scores
from mplus.testing.rounding import check_ranking

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


TEXT_TOKENS, TEXT_SEED = 3, 99
"""Of the text that rows are selected for where no other is given."""


def every_score(view, text=None, score="mean_dot"):
    """The score of every row in float64, by id, and how far another computation of it may be off."""
    text = normal(TEXT_TOKENS, TEXT_SEED) if text is None else text
    mask = torch.ones(1, text.shape[0], dtype=torch.bool)
    exact, tolerance = exact_scores(SCORES[score], text[None], mask, view.keys(0)[None])
    return dict(zip(view.ids(0).tolist(), exact[0].tolist(), strict=True)), tolerance


def check_scores(found, view, text=None, score="mean_dot"):
    """Raise AssertionError unless the rows have the scores that float64 gives them, but for rounding."""
    scores, tolerance = every_score(view, text, score)
    for row, own in zip(found.ids.tolist(), found.scores.tolist(), strict=True):
        assert abs(own - scores[row]) <= tolerance, (row, own, scores[row], tolerance)


def check_best(found, view, k, text=None, score="mean_dot"):
    """Raise AssertionError unless these are the ``k`` best rows, ranked by their scores, but for rounding."""
    scores, tolerance = every_score(view, text, score)
    assert len(found.ids) == min(k, len(scores))
    check_scores(found, view, text, score)
    check_ranking(found.ids.tolist(), scores, tolerance)


def check_alike(found, expected, view, text=None, score="mean_dot"):
    """Raise AssertionError unless two selections from one view have the same rows, but where their scores are tied."""
    scores, tolerance = every_score(view, text, score)
    assert len(found.ids) == len(expected.ids) == len(set(found.ids.tolist()))
    check_scores(found, view, text, score)
    for row, other in zip(found.ids.tolist(), expected.ids.tolist(), strict=True):
        assert row == other or abs(scores[row] - scores[other]) <= 2 * tolerance


def select(retriever, view, k, text=None):
    text = normal(TEXT_TOKENS, TEXT_SEED) if text is None else text
    mask = torch.ones(1, text.shape[0], dtype=torch.bool)
    return retriever.select(0, text[None], mask, [view], k)[0]
