"""What every ``Retriever`` must do."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import ClassVar

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mplus.errors import NotSupported
from mplus.retrievers.base import Retriever, RetrieverShape, Selection
from mplus.retrievers.scores import Score
from mplus.stores.base import MemoryStore, StoreLayout, StoreView
from mplus.stores.ram import RamStore
from mplus.testing.drawing import draw_rows
from mplus.testing.projections import SmallAttention
from mplus.testing.rounding import allowed, error, nudged
from mplus.testing.strategies import CONFORMANCE, sizes

SHAPE = RetrieverShape(layers=2, hidden_size=6)


@torch.no_grad()
def exact_scores(score: Score, queries: Tensor, mask: Tensor, keys: Tensor) -> tuple[Tensor, float]:
    """``score`` in float64, and how far the same in float32 may be from it: see ``mplus.testing.rounding``."""
    plain, exact = score(queries, mask, keys), score(queries.double(), mask, keys.double())
    moved = [score(nudged(queries, plain.dtype, seed), mask, nudged(keys, plain.dtype, seed + 1)) for seed in (0, 2, 4)]
    return exact, allowed(plain, exact, *moved)


class RetrieverConformance:
    """Subclass it in a test module and set ``implementation``, or override ``make`` and ``make_store``.

    Attributes:
        implementation: the retriever class under test.
        exact: whether ``select`` considers every row. An approximate retriever (an index that looks into some of its
            cells only) need not find the best of all, only as many; and ``least_recall`` of the best.
        least_recall: for one that is not exact and has a score: share of the best rows of clustered keys that it must
            find among as many.
        tolerance: for one without a score of its own: by how much what it ranks by may differ with a text's place in a
            batch. Where there is a score, that is measured, by computing it in float64.
    """

    implementation: ClassVar[type[Retriever]]
    exact: ClassVar[bool] = True
    least_recall: ClassVar[float] = 0.9
    tolerance: ClassVar[float] = 1e-5

    def make(self, shape: RetrieverShape = SHAPE) -> Retriever:
        """Return a new retriever with fixed parameters."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            retriever = self.implementation(shape)
        assert isinstance(retriever, Retriever)
        retriever.attach(SmallAttention(shape))
        return retriever

    def make_store(self, layout: StoreLayout) -> MemoryStore:
        """Return an empty store to retrieve from."""
        return RamStore(layout)

    # ------------------------------------------------------------------ helpers

    def fill(
        self,
        retriever: Retriever,
        count: int,
        seed: int = 1,
        *,
        layer: int = 0,
        scale: float = 1.0,
        dtype: torch.dtype = torch.float32,
    ) -> MemoryStore:
        """Return a store with ``count`` rows in ``layer``, keys projected by the retriever, with a gap in the ids."""
        layout = StoreLayout(
            layers=retriever.shape.layers,
            hidden_size=retriever.shape.hidden_size,
            key_size=retriever.key_size,
            dtype=dtype,
            transposed_keys=retriever.transposed_keys,
        )
        store = self.make_store(layout)
        rows = draw_rows(attrs.evolve(layout, key_size=0, dtype=torch.float32), count + 2, seed)
        with torch.no_grad():
            key = retriever.project_keys(layer, rows.need_hidden() * scale)
        rows = rows.replace(hidden=(rows.need_hidden() * scale).to(dtype), key=None if key is None else key.to(dtype))
        ids = store.append(layer, rows)
        store.remove(layer, ids[[0, (count + 2) // 2]])
        return store

    def queries(self, retriever: Retriever, batch: int, length: int, seed: int = 2, layer: int = 0) -> Tensor:
        """Projected queries ``[B, T, r]`` of random text."""
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(batch, length, retriever.shape.hidden_size, generator=generator)
        with torch.no_grad():
            return retriever.project_queries(layer, hidden)

    def has_score(self, retriever: Retriever) -> bool:
        """Return whether the implementation has a ``score`` of its own."""
        return type(retriever).score is not Retriever.score

    def check_format(self, selection: Selection, store: StoreView, layer: int, k: int) -> None:
        """Raise AssertionError unless this can be a selection of ``k`` rows: sorted, unique, from the store."""
        ids, scores = selection.ids.tolist(), selection.scores.tolist()
        assert selection.ids.dtype == torch.int64
        assert selection.scores.dtype == torch.float32
        assert len(ids) == len(scores) == len(set(ids))
        assert len(ids) == min(k, store.count(layer))
        assert set(ids) <= set(store.ids(layer).tolist())
        assert list(zip(scores, ids, strict=True)) == sorted(
            zip(scores, ids, strict=True), key=lambda pair: (-pair[0], pair[1])
        ), "score descending, ties by lowest id"

    def rounding(self, retriever: Retriever, layer: int, text: Tensor, store: StoreView) -> float:
        """Return how far two computations of the scores of one text ``[1, T, r]``, unpadded, may be apart."""
        if not self.has_score(retriever):
            return self.tolerance
        keys = store.keys(layer)
        keys = text.new_zeros(store.count(layer), 0) if keys is None else keys
        mask = torch.ones(text.shape[:2], dtype=torch.bool)
        return 2 * exact_scores(partial(retriever.score, layer), text, mask, keys[None])[1]

    def check_same(self, actual: Selection, expected: Selection, every: Selection, tolerance: float) -> None:
        """Raise AssertionError unless two selections agree but for rounding; ``every`` ranks all rows.

        Rows may be exchanged where their scores are no further apart than ``tolerance``, as ``rounding`` says.
        """
        assert actual.ids.shape == expected.ids.shape
        torch.testing.assert_close(actual.scores, expected.scores, atol=tolerance, rtol=0)
        known = dict(zip(every.ids.tolist(), every.scores.tolist(), strict=True))
        for row_id, score in zip(actual.ids.tolist(), actual.scores.tolist(), strict=True):
            assert abs(known[row_id] - score) <= tolerance, f"row {row_id} has another score"

    # ------------------------------------------------------------------ the tests

    def test_has_a_name_and_options(self) -> None:
        assert isinstance(self.implementation.name, str)
        assert self.implementation.name
        assert attrs.has(self.implementation.Options)
        retriever = self.make()
        assert retriever.shape == SHAPE
        assert isinstance(retriever.options, self.implementation.Options)

    @pytest.mark.parametrize("layer", [0, 1])
    def test_projects_to_its_key_size(self, layer: int) -> None:
        retriever = self.make()
        assert self.queries(retriever, 2, 3, layer=layer).shape == (2, 3, retriever.query_size)
        keys = retriever.project_keys(layer, torch.randn(5, SHAPE.hidden_size))
        if retriever.key_size:
            assert keys is not None
            assert keys.shape == (5, retriever.key_size)
        else:
            assert keys is None
        empty = retriever.project_keys(layer, torch.randn(0, SHAPE.hidden_size))
        assert empty is None or empty.shape == (0, retriever.key_size)

    @CONFORMANCE
    @given(data=st.data(), layer=sizes(1), seed=st.integers(0, 2**16))
    def test_picks_the_best_of_all_rows(self, data: st.DataObject, layer: int, seed: int) -> None:
        """Equal hidden states (scaled to zero) give ties wherever scores depend on nothing else."""
        count, length, k = data.draw(sizes(12)), data.draw(sizes(5, 1)), data.draw(sizes(14))
        scale = data.draw(st.sampled_from([0.0, 1.0]))
        retriever = self.make()
        store = self.fill(retriever, count, seed, layer=layer, scale=scale)
        queries = self.queries(retriever, 1, length, seed + 1, layer)
        mask = torch.ones(1, length, dtype=torch.bool)
        (every,) = retriever.select(layer, queries, mask, [store], count)
        (some,) = retriever.select(layer, queries, mask, [store], k)
        self.check_format(every, store, layer, count)
        self.check_format(some, store, layer, k)
        if self.exact:
            best = Selection(every.ids[:k], every.scores[:k])
            if scale == 0:
                assert some.ids.tolist() == best.ids.tolist(), "what is computed from zeros is equal whatever the order"
            self.check_same(some, best, every, self.rounding(retriever, layer, queries, store))

    @CONFORMANCE
    @given(data=st.data(), length=sizes(6, 1), seed=st.integers(0, 2**16))
    def test_padding_does_not_count(self, data: st.DataObject, length: int, seed: int) -> None:
        """Wherever the padding is, and whatever it holds, the text alone decides."""
        retriever = self.make()
        store = self.fill(retriever, 11, seed)
        mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=length, max_size=length).filter(any)))[None]
        queries = self.queries(retriever, 1, length, seed + 1)
        text = queries[mask][None]
        garbage = torch.where(mask[..., None], queries, torch.full_like(queries, 1e3))
        (every,) = retriever.select(0, text, torch.ones(text.shape[:2], dtype=torch.bool), [store], 11)
        (alone,) = retriever.select(0, text, torch.ones(text.shape[:2], dtype=torch.bool), [store], 4)
        (padded,) = retriever.select(0, garbage, mask, [store], 4)
        self.check_same(padded, alone, every, self.rounding(retriever, 0, text, store))

    @CONFORMANCE
    @given(counts=st.lists(sizes(9), min_size=2, max_size=4), seed=st.integers(0, 2**16))
    def test_a_batch_row_is_as_alone(self, counts: list[int], seed: int) -> None:
        """Stores of unequal size, an empty one included, and padding of unequal length."""
        retriever = self.make()
        stores = [self.fill(retriever, count, seed + row) for row, count in enumerate(counts)]
        queries = self.queries(retriever, len(counts), 5, seed)
        lengths = [1 + (seed + row) % 5 for row in range(len(counts))]
        mask = torch.arange(5)[None] >= 5 - torch.tensor(lengths)[:, None]
        together = retriever.select(0, queries, mask, stores, 4)
        assert len(together) == len(counts)
        for row, store in enumerate(stores):
            text = queries[row : row + 1, 5 - lengths[row] :]
            ones = torch.ones(1, lengths[row], dtype=torch.bool)
            (alone,) = retriever.select(0, text, ones, [store], 4)
            (every,) = retriever.select(0, text, ones, [store], counts[row])
            self.check_format(together[row], store, 0, 4)
            self.check_same(together[row], alone, every, self.rounding(retriever, 0, text, store))

    def test_one_store_for_several_rows_is_as_several_equal_stores(self) -> None:
        retriever = self.make()
        store = self.fill(retriever, 9)
        queries, mask = self.queries(retriever, 3, 4), torch.ones(3, 4, dtype=torch.bool)
        shared = retriever.select(0, queries, mask, [store, store, store], 4)
        separate = retriever.select(0, queries, mask, [self.fill(retriever, 9) for _ in range(3)], 4)
        every = retriever.select(0, queries, mask, [store, store, store], 9)
        for row in range(3):
            tolerance = self.rounding(retriever, 0, queries[row : row + 1], store)
            self.check_same(shared[row], separate[row], every[row], tolerance)

    @pytest.mark.parametrize(("count", "k"), [(0, 3), (0, 0), (4, 0), (1, 5), (4, 5), (5, 5)])
    def test_fewer_rows_than_asked_for(self, count: int, k: int) -> None:
        retriever = self.make()
        store = self.fill(retriever, count)
        queries, mask = self.queries(retriever, 1, 3), torch.ones(1, 3, dtype=torch.bool)
        for view in (store, store.snapshot()):
            (selection,) = retriever.select(0, queries, mask, [view], k)
            self.check_format(selection, view, 0, k)

    def test_equal_input_gives_equal_output(self) -> None:
        """Whatever the global generator is at, which is left alone; and for a store that came about otherwise."""
        retriever, again = self.make(), self.make()
        store = self.fill(retriever, 12)
        other = store.fork()
        extra = other.append(0, other.gather(0, other.ids(0)[:3]))
        other.remove(0, extra)
        queries, mask = self.queries(retriever, 1, 4), torch.ones(1, 4, dtype=torch.bool)
        (first,) = retriever.select(0, queries, mask, [store], 5)
        (every,) = retriever.select(0, queries, mask, [store], 12)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(123)
            state = torch.get_rng_state()
            for maker, view in ((retriever, store), (again, store), (retriever, store.snapshot()), (retriever, other)):
                (selection,) = maker.select(0, queries.clone(), mask, [view], 5)
                if view is other:  # a product over rows in other company may be rounded otherwise in its last bits
                    self.check_same(selection, first, every, self.rounding(retriever, 0, queries, store))
                else:
                    assert selection.ids.tolist() == first.ids.tolist()
                    assert selection.scores.tolist() == first.scores.tolist()
            assert torch.equal(torch.get_rng_state(), state), "the global generator was used"

    @CONFORMANCE
    @given(count=sizes(9), length=sizes(5, 1), layer=sizes(1), seed=st.integers(0, 2**16))
    def test_select_ranks_by_score(self, count: int, length: int, layer: int, seed: int) -> None:
        """A retriever that has no score says so by name; one that has is trained by what it ranks by."""
        retriever = self.make()
        stores = [self.fill(retriever, count, seed + row, layer=layer) for row in range(2)]
        queries = self.queries(retriever, 6, length, seed, layer)
        mask = torch.arange(length)[None] >= torch.arange(6)[:, None] % length
        keys = [store.keys(layer) for store in stores]
        stacked = torch.zeros(2, count, 0) if keys[0] is None else torch.stack([key for key in keys if key is not None])
        each, texts = queries.view(2, 3, length, -1), mask.view(2, 3, length)
        if not self.has_score(retriever):
            with pytest.raises(NotSupported, match=repr(self.implementation.name)):
                retriever.score(layer, each, texts, stacked)
            return
        exact, tolerance = exact_scores(partial(retriever.score, layer), each, texts, stacked)
        scores = retriever.score(layer, each, texts, stacked)
        assert scores.shape == exact.shape == (2, 3, count)
        assert error(scores, exact) <= tolerance
        for number in range(3):
            one = retriever.score(layer, each[:, number], texts[:, number], stacked)
            assert error(one, exact[:, number]) <= tolerance
            for row, selection in enumerate(retriever.select(layer, each[:, number], texts[:, number], stores, count)):
                place = torch.searchsorted(stores[row].ids(layer), selection.ids)
                assert error(selection.scores, exact[row, number, place]) <= tolerance

    @pytest.mark.parametrize("length", [1, 40])
    def test_finds_the_best_of_clustered_rows(self, length: int) -> None:
        """For texts of a few clusters; by the score of every row, whatever way ``select`` takes."""
        retriever = self.make()
        if not self.has_score(retriever):
            return
        generator = torch.Generator().manual_seed(4)
        centers = 3 * torch.randn(12, SHAPE.hidden_size, generator=generator)
        rows = centers.repeat(50, 1) + torch.randn(600, SHAPE.hidden_size, generator=generator)
        store = self.fill(retriever, 598)
        keys = retriever.project_keys(0, rows)
        kept = draw_rows(attrs.evolve(store.layout, key_size=0), 600, 0).replace(hidden=rows)
        store.remove(0, store.ids(0))
        store.append(0, kept.replace(key=None if keys is None else keys.detach()))
        text = centers[torch.arange(length) % 3] + torch.randn(length, SHAPE.hidden_size, generator=generator)
        queries, mask = retriever.project_queries(0, text[None]).detach(), torch.ones(1, length, dtype=torch.bool)
        (selection,) = retriever.select(0, queries, mask, [store], 20)
        self.check_format(selection, store, 0, 20)
        every = store.keys(0)
        keys = torch.zeros(600, 0) if every is None else every
        (scores,), tolerance = exact_scores(partial(retriever.score, 0), queries, mask, keys[None])
        found = scores[torch.searchsorted(store.ids(0), selection.ids)]
        assert error(selection.scores, found) <= tolerance
        share = float((found >= scores.topk(20).values[-1] - 2 * tolerance).float().mean())
        assert share >= (1.0 if self.exact else self.least_recall), f"only {share} of the best rows were found"

    def test_score_can_be_trained(self) -> None:
        """In float32 whatever it is given, under autocast too, and untouched by what padding holds."""
        retriever = self.make()
        hidden = torch.randn(1, 4, SHAPE.hidden_size, generator=torch.Generator().manual_seed(3))
        mask, memory = torch.tensor([[False, True, True, True]]), torch.randn(5, SHAPE.hidden_size)
        keys = retriever.project_keys(0, memory)
        queries = retriever.project_queries(0, hidden)
        keys = torch.zeros(5, 0) if keys is None else keys
        if not self.has_score(retriever):
            return
        queries = queries.detach().masked_fill(~mask[..., None], torch.inf).requires_grad_()
        keys = keys.detach().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scores = retriever.score(0, queries.bfloat16(), mask, keys.bfloat16()[None])
        assert scores.dtype == torch.float32
        (scores * torch.arange(5)).sum().backward()
        assert keys.grad is not None
        assert queries.grad is not None
        assert bool(keys.grad.abs().sum() > 0)
        assert bool(queries.grad[mask].abs().sum() > 0)
        assert not bool(queries.grad[~mask].any())

    def test_changes_nothing(self) -> None:
        retriever = self.make()
        store = self.fill(retriever, 8)
        ids, rows = store.ids(0).clone(), store.gather(0, store.ids(0))
        queries, mask = self.queries(retriever, 2, 4), torch.tensor([[True] * 4, [False, True, True, False]])
        kept = queries.clone(), mask.clone(), {name: value.clone() for name, value in retriever.state_dict().items()}
        retriever.select(0, queries, mask, [store, store], 3)
        assert store.ids(0).tolist() == ids.tolist()
        for name, column in store.gather(0, ids).columns().items():
            assert torch.equal(column, rows.columns()[name]), name
        assert store.count(1) == 0
        assert torch.equal(queries, kept[0])
        assert torch.equal(mask, kept[1])
        assert {name: value.tolist() for name, value in retriever.state_dict().items()} == {
            name: value.tolist() for name, value in kept[2].items()
        }

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_scores_are_float32_in_lower_precision(self, dtype: torch.dtype) -> None:
        retriever = self.make()
        store = self.fill(retriever, 8, dtype=dtype)
        queries, mask = self.queries(retriever, 1, 4).to(dtype), torch.ones(1, 4, dtype=torch.bool)
        (selection,) = retriever.select(0, queries, mask, [store], 5)
        self.check_format(selection, store, 0, 5)
        retriever.to(dtype)
        assert self.queries(retriever, 1, 4).shape == queries.shape

    @pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
    def test_works_in_every_grad_mode(self, mode: Callable[[], AbstractContextManager[None]]) -> None:
        retriever = self.make()
        store = self.fill(retriever, 8)
        hidden = torch.randn(1, 4, SHAPE.hidden_size, generator=torch.Generator().manual_seed(2))
        mask = torch.ones(1, 4, dtype=torch.bool)
        with mode():
            queries = retriever.project_queries(0, hidden)
            (selection,) = retriever.select(0, queries, mask, [store], 5)
        (plain,) = retriever.select(0, self.queries(retriever, 1, 4), mask, [store], 5)
        (every,) = retriever.select(0, self.queries(retriever, 1, 4), mask, [store], 8)
        tolerance = self.rounding(retriever, 0, self.queries(retriever, 1, 4), store)
        self.check_same(Selection(selection.ids.clone(), selection.scores.detach().clone()), plain, every, tolerance)

    def test_loads_its_own_state(self) -> None:
        retriever, other = self.make(), self.make()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.copy_(torch.randn_like(parameter))
        other.load_state_dict(retriever.state_dict())
        store = self.fill(retriever, 8)
        queries, mask = self.queries(retriever, 1, 4), torch.ones(1, 4, dtype=torch.bool)
        (expected,) = retriever.select(0, queries, mask, [store], 5)
        (selection,) = other.select(0, self.queries(other, 1, 4), mask, [store], 5)
        assert selection.ids.tolist() == expected.ids.tolist()
