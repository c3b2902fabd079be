"""Retrievers standing in for a decoder's own."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from mplus.errors import ConfigError, UnknownNameError
from mplus.evaluation.options import ArmOptions
from mplus.evaluation.retriever_swap import Rekeyed, find_way, retriever_for, usable, with_own_parameters
from mplus.evaluation.tracing import TracingMechanism, scores
from mplus.hf.reading.override import reading_as
from mplus.retrievers.scores import SCORES
from mplus.testing.retrievers import exact_scores
from mplus.testing.rounding import check_ranking
from tests.memory.tiny import K0, build, ids, prompts, rounding, variant, written

pytestmark = pytest.mark.two_computations


def test_a_retriever_without_keys_is_taken_as_it_is():
    retriever = retriever_for(variant("paper"), "random", seed=4)
    assert retriever.name == "random"
    assert retriever.options.seed == 4
    with pytest.raises(UnknownNameError, match="no retriever is called 'nothing'"):
        retriever_for(variant("paper"), "nothing")
    with pytest.raises(ConfigError, match="'width' is not a field"):
        retriever_for(variant("paper"), "random", width=4)


def test_another_width_of_keys_ranks_by_its_own_keys():
    memory = written("paper", [200, 160])
    other = retriever_for(variant("paper"), "linear", width=5, score="sigmoid_mean")
    assert isinstance(other, Rekeyed)
    views = memory.snapshot()
    hidden = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 3, dtype=torch.bool)
    with torch.no_grad():
        for layer in range(3):
            queries = other.project_queries(layer, hidden)
            found = other.select(layer, queries, mask, [view.store for view in views], K0)
            for row, (view, selection) in enumerate(zip(views, found, strict=True)):
                rows = view.store.gather(layer, view.store.ids(layer)).hidden
                norm = variant("paper").model.layers[layer].input_layernorm
                keys, text = other.inner.project_keys(layer, norm(rows)), queries[row : row + 1]
                scores, tolerance = exact_scores(SCORES["sigmoid_mean"], text, mask[:1], keys[None])
                known = dict(zip(view.store.ids(layer).tolist(), scores[0].tolist(), strict=True))
                check_ranking(selection.ids.tolist(), known, tolerance)
    with reading_as(variant("paper"), retriever=other), torch.no_grad():
        one = variant("paper")(input_ids=prompts(2), memory=memory).logits
    assert torch.isfinite(one).all()


def test_a_retriever_that_takes_the_parameters_of_the_own_one_reads_its_keys():
    model = variant("paper")
    own = model.mplus_engine.mechanism.retriever
    memory = written("paper", [200])
    views = [view.store for view in memory.snapshot()]
    hidden = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    for name, options in (("centroid", {"centroids": 4}), ("faiss_ivf", {"least": 8, "cells": 3, "probes": 3})):
        other = with_own_parameters(model, name, **options)
        assert (other.name, other.key_size, other.options.score) == (name, own.key_size, own.options.score)
        assert not any(parameter.requires_grad for parameter in other.parameters())
        queries, mask = other.project_queries(1, hidden), torch.ones(1, 3, dtype=torch.bool)
        assert torch.equal(queries, own.project_queries(1, hidden))
        [found] = other.select(1, queries, mask, views, K0)
        scores, tolerance = exact_scores(SCORES[own.options.score], queries, mask, views[0].keys(1)[None])
        known = dict(zip(views[0].ids(1).tolist(), scores[0].tolist(), strict=True))
        check_ranking(found.ids.tolist(), known, tolerance)
    with pytest.raises(ConfigError, match="'probes' is not a field"):
        with_own_parameters(model, "centroid", probes=3)


def test_what_cannot_take_them_stands_in_with_parameters_and_keys_of_its_own():
    model = variant("paper")
    assert isinstance(with_own_parameters(model, "linear", width=5), Rekeyed)
    assert with_own_parameters(model, "random").name == "random"
    found = usable(model)
    assert set(found) >= {"attention", "centroid", "faiss_ivf", "random"}
    assert "linear" not in found


def test_candidates_of_a_stand_in_are_ranked_by_its_keys_not_by_those_kept():
    """What looks at few rows fetches their keys; they must be the stand-in's own."""
    memory, model = written("paper", [200]), variant("paper")
    views = [view.store for view in memory.snapshot()]
    hidden, mask = torch.randn(1, 30, 32), torch.ones(1, 30, dtype=torch.bool)
    found = []
    for name, options in (("linear", {}), ("centroid", {"centroids": 2, "oversample": 3})):
        torch.manual_seed(0)
        other = retriever_for(model, name, width=6, score="sigmoid_mean", **options)
        with torch.no_grad():
            found.append(other.select(0, other.project_queries(0, hidden), mask, views, 3)[0])
    linear, centroid = found
    known = dict(zip(linear.ids.tolist(), linear.scores.tolist(), strict=True))
    assert set(known) & set(centroid.ids.tolist())
    for row, score in zip(centroid.ids.tolist(), centroid.scores.tolist(), strict=True):
        assert score == pytest.approx(known.get(row, score), abs=1e-6)


def test_rekeying_with_the_same_keys_changes_nothing():
    for name in ("paper", "published"):  # with rows that wait for a merge, too
        memory = written(name, [200])
        model = memory.engine.model
        with torch.no_grad():
            usual = model(input_ids=prompts(1), memory=memory).logits
            norms = [layer.input_layernorm for layer in model.model.layers]
            with reading_as(model, retriever=Rekeyed(memory.engine.mechanism.retriever, norms)):
                again = model(input_ids=prompts(1), memory=memory).logits
        torch.testing.assert_close(again, usual, atol=rounding(name), rtol=0)


def test_attention_finds_what_a_decoder_wrapped_with_it_finds():
    """The decoder is the same; only what long-term memory keeps as keys differs, and here they are made anew."""
    other = build(retriever="attention", long_term_tokens=None)
    memory = written("paper", [200])
    model = memory.engine.model
    seen = {}
    tracing = partial(TracingMechanism, seen=seen)
    with torch.no_grad(), reading_as(model, retriever=retriever_for(model, "attention"), around=tracing):
        model(input_ids=prompts(1), memory=memory)
    own = other.mplus_engine.mechanism.retriever
    for layer, one in seen.items():
        hidden = memory.stores[0].gather(layer, memory.stores[0].ids(layer)).hidden
        norm = other.model.layers[layer].input_layernorm
        with torch.no_grad():
            keys = own.project_keys(layer, norm(hidden))
            scores = own.score(layer, own.project_queries(layer, one.hidden), one.mask, keys[None])[0]
        best = memory.stores[0].ids(layer)[scores.argsort(descending=True)[:K0]]
        assert sorted(one.found[0].ids.tolist()) == sorted(best.tolist())


def test_rows_without_hidden_states_are_searched_by_their_own_keys_only():
    model = build(memory_rows="projected")
    found = usable(model)
    assert "random" in found
    assert not any(isinstance(retriever, Rekeyed) for retriever in found.values())
    assert "are kept as keys and values only" in find_way(model, "mplus-attention", ArmOptions())
    memory, seen = model.new_memory(), {}
    memory.write(ids(200), progress=False)
    with torch.no_grad(), reading_as(model, around=partial(TracingMechanism, seen=seen)):
        model(input_ids=prompts(1), memory=memory)
    for layer, one in seen.items():
        everything = scores(model.mplus_engine, layer, one, 0)
        assert len(everything) == memory.stores[0].count(layer) + len(memory.states[0].stm[layer])
        assert bool(everything.isfinite().all())
