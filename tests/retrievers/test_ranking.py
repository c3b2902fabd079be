"""The best rows, block by block: against sorting all of them."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch.utils._python_dispatch import TorchDispatchMode

from mplus.errors import InputError
from mplus.retrievers import ranking
from mplus.retrievers.ranking import best_rows, top_places
from mplus.stores.base import Chunk
from mplus.testing.rounding import allowed, check_ranking, error

pytestmark = pytest.mark.two_computations

NUMBERS = st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, 1.5, -1.5, 2.0**-126, -(2.0**-126), 2.0**127, -(2.0**127), math.inf, -math.inf, math.nan]
)
SCORES = st.lists(NUMBERS | st.floats(width=32, allow_subnormal=False), max_size=30)


def slow(scores: list[float], k: int) -> list[int]:
    """Positions by descending score, then ascending position; NaN as the lowest score there is."""
    known = [-math.inf if math.isnan(score) else score for score in scores]
    return sorted(range(len(scores)), key=lambda place: (-known[place], place))[:k]


@given(SCORES, st.integers(0, 35))
def test_the_best_places_are_those_of_a_sort(scores: list[float], k: int) -> None:
    places, best = top_places(torch.tensor(scores, dtype=torch.float32), k)
    expected = slow(scores, k)
    assert places.tolist() == expected
    assert best.tolist() == [-math.inf if math.isnan(scores[place]) else scores[place] for place in expected]


@given(
    st.lists(st.lists(st.tuples(NUMBERS, NUMBERS, st.booleans()), max_size=12), max_size=5),
    st.integers(0, 40),
    st.integers(1, 9),
    st.integers(1, 2),
    st.sampled_from([0, 0, 4, 99]),
)
def test_rows_of_many_blocks_rank_like_rows_of_one(
    layers: list[list[tuple[float, float, bool]]], k: int, block: int, texts: int, few: int
) -> None:
    """A row's key is its score for each of two texts; rows that were removed lie between the others."""
    chunks, rows, next_id = [], [], 7
    for places in layers:
        ids = torch.arange(next_id, next_id + 3 * len(places), 3)
        live = torch.tensor([there for _, _, there in places], dtype=torch.bool)
        keys = torch.tensor([place[:2] for place in places], dtype=torch.float32).reshape(-1, 2)
        chunks.append(Chunk(ids, None if bool(live.all()) else live, {"key": keys}))
        rows += [(int(i), place) for i, place in zip(ids, places, strict=True) if place[2]]
        next_id += 3 * len(places) + 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "BLOCK", block)
        patch.setattr(ranking, "FEW", few)
        found = best_rows(chunks, texts, k, lambda keys: keys.T[:texts].contiguous())
    for text, (ids, best) in enumerate(found):
        scores = [place[text] for _, place in rows]
        expected = slow(scores, k)
        assert ids.tolist() == [rows[place][0] for place in expected]
        assert best.tolist() == [-math.inf if math.isnan(scores[place]) else scores[place] for place in expected]


def test_of_two_rows_with_the_last_score_the_first_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.topk`` may take either."""
    monkeypatch.setattr(ranking, "FEW", 0)
    for count in range(3, 60):
        order = torch.randperm(count, generator=torch.Generator().manual_seed(count))
        scores = torch.ones(count)
        scores[order[:2]] = 0.0
        ((ids, _),) = best_rows(
            [Chunk(torch.arange(count), None, {"key": scores[:, None]})], 1, count - 1, lambda k: k.T
        )
        assert ids[-1] == order[:2].min()


@pytest.mark.parametrize("kind", ["drawn", "few values", "sample low", "sample high", "removed", "lowest"])
def test_a_sample_changes_no_choice(kind: str) -> None:
    """Far more rows than are wanted: most are left out by a look at every 16th."""
    generator = torch.Generator().manual_seed(3)
    count, k = 20_000, 100
    scores = torch.randn(count, generator=generator)
    scores[::977] = math.nan
    live = None
    if kind == "few values":
        scores = scores.round()
    elif kind == "sample low":
        scores[:: ranking.SAMPLED] -= 100
    elif kind == "sample high":
        scores[:: ranking.SAMPLED] += 100
    elif kind == "removed":
        live = scores < 1.5
    elif kind == "lowest":
        scores = torch.full((count,), -math.inf)
        live = torch.arange(count) > 50
    rows = [place for place in range(count) if live is None or bool(live[place])]
    expected = [rows[place] for place in slow(scores[rows].tolist(), k)]
    for texts in (1, 2):
        chunks = [Chunk(torch.arange(count), live, {"key": scores[:, None]})]
        for ids, _ in best_rows(chunks, texts, k, lambda keys, texts=texts: keys.T.expand(texts, -1)):
            assert ids.tolist() == expected


def test_scores_of_many_rows_are_never_held_together() -> None:
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.shape[:1] == (8,):
                largest = max(largest, result.numel())
            return result

    keys = torch.randn(3 * ranking.BLOCK // 8, 4, generator=torch.Generator().manual_seed(0))
    queries = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    with Watch():
        found = best_rows([Chunk(torch.arange(len(keys)), None, {"key": keys})], 8, 5, lambda part: queries @ part.T)
    assert 0 < largest <= ranking.BLOCK + 8 * 5
    for (ids, best), query in zip(found, queries, strict=True):
        exact = keys.double() @ query.double()
        tolerance = allowed(keys @ query, exact)
        check_ranking(ids.tolist(), dict(enumerate(exact.tolist())), tolerance)
        assert error(best, exact[ids]) <= tolerance


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(InputError, match=r"scores must be torch\.float32, got torch\.float64"):
        top_places(torch.zeros(3, dtype=torch.float64), 1)
