"""Every registered retriever, and what is particular to each of ours."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mplus.errors import ConfigError, InputError, NotSupported
from mplus.retrievers import RETRIEVERS, scores
from mplus.retrievers.attention import AttentionRetriever
from mplus.retrievers.base import Retriever, RetrieverShape, top_k
from mplus.retrievers.linear import LinearRetriever
from mplus.retrievers.random import RandomRetriever
from mplus.retrievers.scores import SCORES, score_rows
from mplus.rows import MemoryRows
from mplus.stores.base import StoreLayout
from mplus.stores.ram import RamStore
from mplus.testing import suites
from mplus.testing.drawing import draw_rows
from mplus.testing.projections import SmallAttention
from mplus.testing.retrievers import RetrieverConformance, exact_scores
from mplus.testing.rounding import allowed, check_ranking, error, nudged
from mplus.testing.strategies import CONFORMANCE
from tests.helpers.docstrings import run_examples

pytestmark = pytest.mark.two_computations

globals().update(suites(RetrieverConformance, RETRIEVERS))

SHAPE = RetrieverShape(layers=2, hidden_size=6)


def store_of(keys: torch.Tensor, hidden_size: int = 6, layers: int = 2) -> RamStore:
    layout = StoreLayout(layers=layers, hidden_size=hidden_size, key_size=keys.shape[1], dtype=keys.dtype)
    store = RamStore(layout)
    for layer in range(layers):
        store.append(layer, draw_rows(layout, keys.shape[0], 0).replace(key=keys))
    return store


def test_the_example_of_the_class_does_what_it_says():
    store = RamStore(StoreLayout(layers=2, hidden_size=6))
    store.append(0, draw_rows(store.layout, 5, 0).replace(birth=torch.arange(5)))
    run_examples(Retriever, torch=torch, store=store)


def text(batch: int, length: int) -> torch.Tensor:
    return torch.ones(batch, length, dtype=torch.bool)


class TestTopK:
    @CONFORMANCE
    @given(
        scores=st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, float("inf"), float("-inf"), float("nan")]), max_size=30),
        k=st.integers(0, 35),
    )
    def test_ranks_by_score_then_position_with_nan_last(self, scores, k):
        order = sorted(
            range(len(scores)),
            key=lambda place: (-scores[place] if scores[place] == scores[place] else float("inf"), place),
        )
        selection = top_k(torch.tensor(scores), torch.arange(len(scores)) * 10, k)
        assert selection.ids.tolist() == [10 * place for place in order[:k]]

    def test_one_value_everywhere(self):
        selection = top_k(torch.full((1000,), 0.5), torch.arange(1000), 17)
        assert selection.ids.tolist() == list(range(17))


def slow_score(kind, queries, key):
    """One text, one row, token by token, in float64."""
    queries, key = queries.double(), key.double()
    if kind == "mean_dot":
        return sum((q @ key).item() for q in queries) / len(queries)
    return sum(torch.sigmoid(q @ key).item() for q in queries) / len(queries)


@pytest.mark.parametrize("kind", SCORES)
class TestScores:
    @CONFORMANCE
    @given(data=st.data(), seed=st.integers(0, 2**16))
    def test_equal_the_slow_reference_for_every_text_of_every_stream(self, kind, data, seed):
        streams, texts, length, rows = (data.draw(st.integers(1, 3)) for _ in range(4))
        generator = torch.Generator().manual_seed(seed)
        queries = torch.randn(streams, texts, length, 3, generator=generator)
        keys = torch.randn(streams, rows, 3, generator=generator)
        mask = torch.rand(streams, texts, length, generator=generator) < 0.6
        mask[..., 0] = True
        found, (_, tolerance) = SCORES[kind](queries, mask, keys), exact_scores(SCORES[kind], queries, mask, keys)
        assert found.shape == (streams, texts, rows)
        for b in range(streams):
            for t in range(texts):
                own = queries[b, t][mask[b, t]]
                expected = torch.tensor([slow_score(kind, own, key) for key in keys[b]], dtype=torch.float64)
                assert error(found[b, t], expected) <= tolerance
                for piece in score_rows(kind, [own] * 2, keys[b]):
                    assert error(piece, expected) <= tolerance
                assert error(SCORES[kind](queries[b, t], mask[b, t], keys[b]), expected) <= tolerance

    def test_gradients(self, kind):
        generator = torch.Generator().manual_seed(0)
        queries = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
        keys = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64, requires_grad=True)
        mask = torch.tensor([True, False, True, True]).expand(2, 3, 4)
        assert torch.autograd.gradcheck(lambda q, k: SCORES[kind](q, mask, k), (queries, keys))

    def test_a_text_without_tokens_scores_zero(self, kind):
        queries = torch.ones(2, 3, 4, requires_grad=True)
        mask = torch.tensor([[True] * 3, [False] * 3])
        found = SCORES[kind](queries, mask, torch.ones(2, 5, 4))
        assert found[1].tolist() == [0.0] * 5
        found.sum().backward()
        assert bool(queries.grad.isfinite().all())

    @pytest.mark.parametrize(
        ("queries", "mask", "keys"),
        [
            ((2, 3, 4), (2, 3), (1, 5, 4)),
            ((2, 3, 4), (2, 3), (2, 5, 3)),
            ((2, 3, 4), (2, 2), (2, 5, 4)),
            ((3, 4), (3,), (2, 5, 4)),
            ((3, 4), (3,), (4,)),
        ],
    )
    def test_shapes_that_do_not_fit_are_named(self, kind, queries, mask, keys):
        with pytest.raises(InputError, match=r"queries must be \[B, T, r\] .* got queries \[.*\], a mask .* and keys"):
            SCORES[kind](torch.zeros(queries), torch.ones(mask).bool(), torch.zeros(keys))
        with pytest.raises(InputError, match=r"must be bool, got torch\.float32"):
            SCORES[kind](torch.zeros(3, 4), torch.ones(3), torch.zeros(5, 4))

    @pytest.mark.parametrize("bound", [1, 7, 64, 10**9])
    def test_pieces_do_not_change_the_scores_and_stay_below_the_bound(self, monkeypatch, kind, bound):
        generator = torch.Generator().manual_seed(0)
        keys, queries = torch.randn(50, 4, generator=generator), torch.randn(5, 4, generator=generator)
        expected, tolerance = exact_scores(SCORES[kind], queries, text(1, 5)[0], keys)
        largest = 0

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                nonlocal largest
                result = func(*args, **(kwargs or {}))
                if func.name().startswith(("aten::mm", "aten::matmul", "aten::bmm")):
                    largest = max(largest, result.numel())
                return result

        monkeypatch.setattr(scores, "MAX_PRODUCTS", bound)
        with Watch():
            found = score_rows(kind, [queries, queries[:2]], keys)
        assert error(found[0], expected) <= tolerance
        assert 0 < largest <= max(bound, 5)

    def test_stay_float32_under_autocast_and_for_low_precision_keys(self, kind):
        generator = torch.Generator().manual_seed(0)
        keys = torch.randn(400, 16, generator=generator).bfloat16()
        queries = torch.randn(6, 16, generator=generator).bfloat16()
        expected, tolerance = exact_scores(SCORES[kind], queries.float(), text(1, 6)[0], keys.float())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            (pieces,) = score_rows(kind, [queries], keys)
            whole = SCORES[kind](queries, text(1, 6)[0], keys)
        for found in (pieces, whole):
            assert error(found, expected) <= tolerance
            assert found.unique().numel() > 390  # in bfloat16 many would be tied


class TestLinear:
    @pytest.mark.parametrize("layer", [0, 1])
    @pytest.mark.parametrize("kind", SCORES)
    def test_scores_are_those_of_the_projections(self, layer, kind):
        torch.manual_seed(0)
        retriever = LinearRetriever(SHAPE, LinearRetriever.Options(width=5, score=kind))
        memory, hidden = torch.randn(30, 6), torch.randn(2, 7, 6)
        mask = text(2, 7)
        mask[0, :3] = False

        def projected(projector, hidden):
            """One by one."""
            first, last = (projector[place].weight.to(hidden.dtype) for place in (0, 2))
            return torch.stack([last @ nn.functional.silu(first @ one) for one in hidden])

        with torch.no_grad():
            store = store_of(retriever.project_keys(layer, memory))
            found = retriever.select(layer, retriever.project_queries(layer, hidden), mask, [store, store], 8)
            query, key = retriever.query_proj[layer], retriever.key_proj[layer]
            for row in range(2):

                def scored(hidden, memory):
                    queries, keys = projected(query, hidden), projected(key, memory)
                    return torch.tensor([slow_score(kind, queries, key) for key in keys], dtype=torch.float64)

                own = hidden[row][mask[row]]
                exact = scored(own.double(), memory.double())
                moved = [scored(nudged(own, own.dtype, seed), nudged(memory, own.dtype, seed)) for seed in range(3)]
                tolerance = allowed(scored(own, memory).float(), exact, *moved)
                check_ranking(found[row].ids.tolist(), dict(enumerate(exact.tolist())), tolerance)
                assert error(found[row].scores, exact[found[row].ids]) <= tolerance

    def test_a_shared_store_is_read_once(self):
        class Counting(RamStore):
            reads = 0

            def chunks(self, layer, *names):
                Counting.reads += "key" in names
                return super().chunks(layer, *names)

        retriever = LinearRetriever(SHAPE, LinearRetriever.Options(width=5))
        layout = StoreLayout(layers=2, hidden_size=6, key_size=5)
        store = Counting(layout)
        store.append(0, draw_rows(layout, 4, 0))
        retriever.select(0, torch.randn(3, 2, 5), text(3, 2), [store, store, store], 2)
        assert Counting.reads == 1

    def test_ties_go_to_the_lowest_id(self):
        retriever = LinearRetriever(SHAPE, LinearRetriever.Options(width=1, score="sigmoid_mean"))
        # Products of -300, 0 and 300 have the sigmoids 0, 1/2 and 1 exactly.
        store = store_of(torch.tensor([0.0, 300, -300, 300, 0, 300]).repeat(40)[:, None])
        (selection,) = retriever.select(0, torch.ones(1, 3, 1), text(1, 3), [store], 130)
        sure = [row for row in range(240) if row % 6 in (1, 3, 5)]
        assert selection.ids.tolist() == sure + [row for row in range(240) if row % 6 in (0, 4)][:10]
        assert selection.scores.tolist() == [1.0] * 120 + [0.5] * 10

    @pytest.mark.parametrize(("layers", "parameters"), [(1, 6 * 5), (2, 6 * 10 + 10 * 5)])
    def test_projectors(self, layers, parameters):
        retriever = LinearRetriever(SHAPE, LinearRetriever.Options(width=5, layers=layers))
        assert retriever.key_size == 5
        assert sum(p.numel() for p in retriever.query_proj[1].parameters()) == parameters
        assert len(retriever.query_proj) == len(retriever.key_proj) == 2
        assert not any("bias" in name for name, _ in retriever.named_parameters())
        hidden = torch.randn(4, 6)
        assert not torch.equal(retriever.project_keys(0, hidden), retriever.project_keys(1, hidden))
        assert not torch.equal(retriever.project_keys(0, hidden), retriever.project_queries(0, hidden[None])[0])

    def test_projectors_train(self):
        retriever = LinearRetriever(SHAPE)
        hidden = torch.randn(1, 3, 6)
        loss = retriever.project_queries(0, hidden).sum() + retriever.project_keys(0, hidden[0]).sum()
        loss.backward()
        used = {name for name, p in retriever.named_parameters() if p.grad is not None}
        assert used == {f"{kind}_proj.0.{place}.weight" for kind in ("query", "key") for place in (0, 2)}

    def test_takes_hidden_states_of_another_precision(self):
        retriever = LinearRetriever(SHAPE)
        assert retriever.project_queries(0, torch.randn(1, 3, 6).bfloat16()).dtype == torch.float32
        assert retriever.to(torch.bfloat16).project_keys(0, torch.randn(3, 6)).dtype == torch.bfloat16

    def test_a_store_without_keys_is_refused(self):
        layout = StoreLayout(layers=2, hidden_size=6)
        with pytest.raises(ValueError, match="key_size=0"):
            LinearRetriever(SHAPE).select(0, torch.randn(1, 2, 256), text(1, 2), [RamStore(layout)], 1)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"width": 0}, "width must be a whole number of at least 1, got 0"),
            ({"width": 2.5}, "width must be .*, got 2.5"),
            ({"layers": 3}, "layers must be one of 1, 2, got 3"),
            ({"score": "dot"}, "score must be one of 'mean_dot', 'sigmoid_mean', got 'dot'"),
        ],
    )
    def test_bad_options_are_named(self, options, message):
        with pytest.raises(ConfigError, match=message):
            LinearRetriever.Options(**options)

    def test_the_published_variant_has_its_own_score(self):
        assert LinearRetriever.Options.defaults("paper") == {}
        assert LinearRetriever.Options.defaults("published") == {"score": "sigmoid_mean"}
        assert LinearRetriever(SHAPE).facts() == {"score": "mean_dot"}


class TestAttention:
    @pytest.mark.parametrize("layer", [0, 1])
    @pytest.mark.parametrize("bound", [1, 100, 10**9])
    def test_scores_are_mean_shares_of_every_head_and_token(self, monkeypatch, layer, bound):
        monkeypatch.setattr(scores, "MAX_PRODUCTS", bound)
        own, retriever = SmallAttention(SHAPE), AttentionRetriever(SHAPE)
        retriever.attach(own)
        generator = torch.Generator().manual_seed(layer)
        memory, hidden = torch.randn(30, 6, generator=generator), torch.randn(1, 7, 6, generator=generator)
        mask = torch.arange(7)[None] > 2
        store = store_of(retriever.project_keys(layer, memory))
        (found,) = retriever.select(layer, retriever.project_queries(layer, hidden), mask, [store], 30)

        def scored(hidden, memory):
            queries, keys = own.queries(layer, hidden)[0, 3:], own.keys(layer, memory[None])[0]
            shares = [
                torch.softmax(0.5 * keys[:, head // 2] @ token[head], 0) for token in queries for head in range(4)
            ]
            return torch.stack(shares).mean(0)

        exact = scored(hidden.double(), memory.double())
        moved = [scored(nudged(hidden, hidden.dtype, seed), nudged(memory, hidden.dtype, seed)) for seed in range(3)]
        tolerance = allowed(scored(hidden, memory), exact, *moved)
        check_ranking(found.ids.tolist(), dict(enumerate(exact.tolist())), tolerance)
        assert error(found.scores, exact[found.ids]) <= tolerance
        assert float(found.scores.sum()) == pytest.approx(1, abs=30 * tolerance)

    def test_nothing_of_the_decoder_becomes_its_own(self):
        retriever = AttentionRetriever(SHAPE)
        retriever.attach(SmallAttention(SHAPE))
        assert list(retriever.parameters()) == []
        assert dict(retriever.state_dict()) == {}
        assert (retriever.key_size, retriever.query_size) == (8, 16)

    def test_a_store_without_keys_is_refused(self):
        retriever = AttentionRetriever(SHAPE)
        retriever.attach(SmallAttention(SHAPE))
        store = RamStore(StoreLayout(layers=2, hidden_size=6))
        with pytest.raises(ValueError, match="needs rows with keys"):
            retriever.select(0, torch.randn(1, 2, 16), text(1, 2), [store], 1)


class TestRandom:
    def test_has_no_score(self):
        with pytest.raises(NotSupported, match="retriever 'random' does not score rows"):
            RandomRetriever(SHAPE).score(0, torch.zeros(1, 2, 0), text(1, 2), torch.zeros(1, 3, 0))

    def test_draws_depend_on_seed_layer_and_content(self):
        store = store_of(torch.zeros(100, 1))
        queries = torch.empty(1, 2, 0)

        def pick(layer, view, seed=0):
            retriever = RandomRetriever(SHAPE, RandomRetriever.Options(seed=seed))
            return retriever.select(layer, queries, text(1, 2), [view], 10)[0].ids.tolist()

        base = pick(0, store)
        assert pick(0, store.fork()) == base
        assert pick(1, store) != base
        assert pick(0, store, seed=1) != base
        store.append(0, store.gather(0, store.ids(0)[:1]))
        grown = pick(0, store)
        assert grown != base
        store.remove(0, store.ids(0)[:1])
        assert [row_id - 1 for row_id in pick(0, store)] != base  # as many rows as at first, but others

    def test_every_row_is_as_likely_as_any_other(self):
        """Chi-squared with 19 degrees of freedom exceeds 43.8 once in a thousand; here the draws never change."""
        store = store_of(torch.zeros(20, 1))
        counts, draws = torch.zeros(20), 1000
        for seed in range(draws):
            retriever = RandomRetriever(SHAPE, RandomRetriever.Options(seed=seed))
            ids = retriever.select(0, torch.empty(1, 1, 0), text(1, 1), [store], 5)[0].ids
            assert len(ids.unique()) == 5
            counts[ids] += 1
        expected = draws * 5 / 20
        assert float(((counts - expected) ** 2 / expected).sum()) < 43.8

    @pytest.mark.parametrize("seed", [-1, 1.5, "0"])
    def test_bad_options_are_named(self, seed):
        with pytest.raises(ConfigError, match="seed must be a whole number of at least 0, got"):
            RandomRetriever.Options(seed=seed)


class TestArguments:
    @pytest.mark.parametrize(
        ("shape", "mask", "stores", "k", "message"),
        [
            ((2, 3, 4), text(2, 3), 1, 1, "2, 3, 4.*1 stores"),
            ((1, 3, 4), text(1, 2), 1, 1, r"mask \[1, 2\]"),
            ((3, 4), text(3, 4), 3, 1, r"queries \[3, 4\]"),
            ((1, 3, 4), text(1, 3).float(), 1, 1, "bool, got torch.float32"),
            ((1, 3, 4), text(1, 3), 1, -1, "k must be at least 0, got -1"),
            ((2, 3, 4), torch.tensor([[True] * 3, [False] * 3]), 2, 1, r"in rows \[1\] all of it is masked"),
        ],
    )
    def test_bad_arguments_are_named(self, shape, mask, stores, k, message):
        store = store_of(torch.zeros(3, 4))
        for kind in (LinearRetriever, RandomRetriever):
            with pytest.raises(InputError, match=message):
                kind(SHAPE).select(0, torch.zeros(shape), mask, [store] * stores, k)


def test_rows_are_still_there_after_retrieval():
    """Retrieval copies: what it returns can be fetched, and fetching leaves the store as it was."""
    store = store_of(torch.randn(9, 4, generator=torch.Generator().manual_seed(0)))
    retriever = LinearRetriever(SHAPE, LinearRetriever.Options(width=4))
    (selection,) = retriever.select(1, torch.ones(1, 2, 4), text(1, 2), [store], 4)
    rows = store.gather(1, selection.ids)
    assert isinstance(rows, MemoryRows)
    assert rows.key is not None
    # Four numbers of size one, added up.
    torch.testing.assert_close(selection.scores, rows.key.sum(1), rtol=0, atol=4 * torch.finfo().eps * 4)
    assert store.count(1) == 9
