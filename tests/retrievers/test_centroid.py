"""The retriever "centroid": what it summarises a text to, and what it brings back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mplus.errors import ConfigError
from mplus.retrievers.base import RetrieverShape
from mplus.retrievers.centroid import CentroidRetriever, summarise, weighted_sigmoids
from mplus.retrievers.linear import LinearRetriever
from mplus.stores.base import StoreLayout
from mplus.stores.ram import RamStore
from mplus.testing.drawing import draw_rows
from mplus.testing.rounding import allowed, check_close, error, nudged
from mplus.testing.strategies import CONFORMANCE
from tests.helpers.indexed import check_alike, check_scores

pytestmark = pytest.mark.two_computations

SHAPE = RetrieverShape(layers=1, hidden_size=4)


def store_of(keys: torch.Tensor) -> RamStore:
    layout = StoreLayout(layers=1, hidden_size=4, key_size=keys.shape[1])
    store = RamStore(layout)
    store.append(0, draw_rows(layout, keys.shape[0], 0).replace(key=keys))
    return store


def made(kind, width, **options):
    return kind(SHAPE, kind.Options(width=width, **options))


def mixed(clusters, seed, *, rows=6000, tokens=200, width=32, size=1.0):
    """Queries of a few of the clusters that keys lie in: a text of few topics."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(100, width, generator=generator)

    def near(count, chosen):
        picked = centers[torch.randint(chosen, (count,), generator=generator)]
        return size * (picked + 0.5 * torch.randn(count, width, generator=generator))

    return near(tokens, clusters), near(rows, 100) / width**0.5


def select(retriever, text, store, k):
    mask = torch.ones(1, text.shape[0], dtype=torch.bool)
    return retriever.select(0, text[None], mask, [store], k)[0]


class TestSummary:
    @CONFORMANCE
    @given(total=st.integers(1, 40), count=st.integers(1, 12), steps=st.integers(1, 4), seed=st.integers(0, 2**16))
    def test_keeps_the_mean_of_the_queries(self, total, count, steps, seed):
        """So that the score is right to first order, whatever the clusters are."""
        queries = torch.randn(total, 3, generator=torch.Generator().manual_seed(seed))
        centers, weights = summarise(queries, count, steps)
        assert len(centers) == len(weights) <= min(total, count)
        exact = queries.double().mean(0)
        moved = [nudged(queries, queries.dtype, seed).mean(0) for seed in range(3)]
        torch.testing.assert_close(weights.sum(), torch.tensor(1.0))
        assert error(weights @ centers, exact) <= allowed(queries.mean(0), exact, *moved)
        assert bool((weights > 0).all())

    def test_no_more_queries_than_centroids_stand_for_themselves(self):
        queries = torch.randn(5, 3)
        centers, weights = summarise(queries, 5, 3)
        assert torch.equal(centers, queries)
        assert weights.tolist() == pytest.approx([0.2] * 5)

    def test_finds_clusters_that_are_far_apart(self):
        places = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
        which = torch.arange(60) % 3
        centers, weights = summarise(places[which] + 0.01 * torch.randn(60, 2), 3, 2)
        order = torch.cdist(places, centers).argmin(1)
        torch.testing.assert_close(centers[order], places, atol=0.05, rtol=0)
        assert weights.tolist() == pytest.approx([1 / 3] * 3)

    def test_equal_queries_are_one_centroid(self):
        centers, weights = summarise(torch.ones(50, 4), 8, 2)
        assert centers.tolist() == [[1.0] * 4]
        assert weights.tolist() == [1.0]


DTYPES = (torch.float32, torch.float64)


def slow(text, key, dtype):
    """The weighted mean of sigmoids, one by one."""
    centers, weights = (part.to(dtype) for part in text)
    return sum(w * torch.sigmoid(c @ key.to(dtype)) for c, w in zip(centers, weights, strict=True))


def test_weighted_sigmoids_equal_the_slow_reference_in_any_pieces(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    texts = [(torch.randn(n, 5, generator=generator), torch.rand(n, generator=generator)) for n in (3, 1, 4)]
    keys = torch.randn(11, 5, generator=generator)
    for bound in (1, 20, 10**6):
        monkeypatch.setattr("mplus.retrievers.scores.MAX_PRODUCTS", bound)
        found = weighted_sigmoids(texts, keys)
        for row in range(len(texts)):
            for column, key in enumerate(keys):
                found_here, (plain, exact) = found[row, column], (slow(texts[row], key, to) for to in DTYPES)
                check_close(found_here, plain, exact)


class TestSelection:
    @CONFORMANCE
    @given(seed=st.integers(0, 2**16), k=st.integers(0, 40), score=st.sampled_from(["mean_dot", "sigmoid_mean"]))
    def test_is_linear_where_there_is_nothing_to_gain(self, seed, k, score):
        """One query for the text, or few tokens: the same code, so bit for bit the same scores."""
        text, keys = mixed(3, seed, rows=60, tokens=40 if score == "mean_dot" else 16, width=4)
        store = store_of(40 * keys if score == "mean_dot" else keys)  # so large that sigmoids would be 0 or 1
        found = select(made(CentroidRetriever, 4, score=score), text, store, k)
        expected = select(made(LinearRetriever, 4, score=score), text, store, k)
        assert found.ids.tolist() == expected.ids.tolist()
        assert found.scores.tolist() == expected.scores.tolist()

    @pytest.mark.parametrize(("clusters", "size", "bound"), [(2, 1.0, 0.99), (20, 2.0, 0.9), (6, 2.0, 0.95)])
    def test_finds_nearly_what_linear_finds_for_texts_of_topics(self, clusters, size, bound):
        """And only with centroids: one of them, the mean query, misses much of it where sigmoids saturate."""
        text, keys = mixed(clusters, seed=1, size=size)
        store = store_of(keys)
        exact = select(made(LinearRetriever, 32, score="sigmoid_mean"), text, store, 100)
        known = set(exact.ids.tolist())
        found = select(made(CentroidRetriever, 32, score="sigmoid_mean"), text, store, 100)
        shared = [row for row in found.ids.tolist() if row in known]
        assert len(shared) >= 100 * bound
        check_scores(found, store, text, "sigmoid_mean")
        if clusters == 6:
            mean = select(made(CentroidRetriever, 32, score="sigmoid_mean", centroids=1), text, store, 100)
            assert len(set(mean.ids.tolist()) & known) < len(shared) - 10

    def test_long_and_short_texts_of_one_batch(self):
        """Each row of a batch is ranked as alone, whether its text is summarised or not."""
        text, keys = mixed(5, seed=2, rows=500, tokens=50, width=8)
        store, other = store_of(keys), store_of(keys[:300])
        mask = torch.ones(4, 50, dtype=torch.bool)
        mask[1, 10:] = mask[3, :40] = False
        retriever = made(CentroidRetriever, 8, score="sigmoid_mean")
        stores = [store, store, other, other]
        together = retriever.select(0, text.expand(4, -1, -1), mask, stores, 20)
        for row, selection in enumerate(together):
            alone = select(retriever, text[mask[row]], stores[row], 20)
            check_alike(selection, alone, stores[row], text[mask[row]], "sigmoid_mean")

    def test_reads_pieces_with_gaps(self):
        """Places that hold no row are never brought back."""

        class Gaps(RamStore):
            def chunks(self, layer, *names):
                whole = super().chunks(layer, *names)[0]
                keys = torch.full((2 * len(whole.ids), 8), 100.0)
                keys[::2] = whole.columns["key"]
                live = torch.arange(len(keys)) % 2 == 0
                ids = whole.ids.repeat_interleave(2)
                cut = 301
                return [
                    type(whole)(ids[part], live[part], {"key": keys[part]}) for part in (slice(cut), slice(cut, None))
                ]

        text, keys = mixed(5, seed=3, rows=400, tokens=50, width=8)
        plain, gaps = store_of(keys), store_of(keys)
        gaps.__class__ = Gaps
        retriever = made(CentroidRetriever, 8, score="sigmoid_mean")
        found, expected = select(retriever, text, gaps, 20), select(retriever, text, plain, 20)
        check_alike(found, expected, plain, text, "sigmoid_mean")

    def test_takes_the_parameters_of_linear(self):
        linear, centroid = made(LinearRetriever, 8), made(CentroidRetriever, 8)
        centroid.load_state_dict(linear.state_dict())
        assert centroid.facts() == linear.facts()

    def test_a_store_without_keys_is_refused(self):
        layout = StoreLayout(layers=1, hidden_size=4)
        store = RamStore(layout)
        store.append(0, draw_rows(layout, 20, 0))
        for tokens in (2, 20):
            with pytest.raises(ValueError, match="needs rows with keys"):
                select(made(CentroidRetriever, 8, score="sigmoid_mean"), torch.randn(tokens, 8), store, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"centroids": 0}, "centroids must be a whole number of at least 1, got 0"),
        ({"steps": 0}, "steps must be .* got 0"),
        ({"oversample": 0.5}, "oversample must be a number of at least 1, got 0.5"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        CentroidRetriever.Options(**options)
