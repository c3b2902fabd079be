"""Retrievers standing in for a decoder's own."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from mplus.errors import ConfigError, UnknownNameError
from mplus.evaluation.stand_ins import Rekeyed, retriever_for
from mplus.evaluation.watching import WatchingMechanism
from mplus.hf.reading_as import reading_as
from tests.memory.tiny import K0, build, prompts, variant, written


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
                scores = (queries[row] @ other.inner.project_keys(layer, norm(rows)).T).sigmoid().mean(0)
                expected = view.store.ids(layer)[scores.argsort(descending=True)[:K0]]
                assert torch.equal(selection.ids, expected)
    with reading_as(variant("paper"), retriever=other), torch.no_grad():
        one = variant("paper")(input_ids=prompts(2), memory=memory).logits
    assert torch.isfinite(one).all()


def test_rekeying_with_the_same_keys_changes_nothing():
    for name in ("paper", "published"):  # with rows that wait for a merge, too
        memory = written(name, [200])
        model = memory.engine.model
        with torch.no_grad():
            usual = model(input_ids=prompts(1), memory=memory).logits
            norms = [layer.input_layernorm for layer in model.model.layers]
            with reading_as(model, retriever=Rekeyed(memory.engine.mechanism.additions.retriever, norms)):
                assert torch.allclose(model(input_ids=prompts(1), memory=memory).logits, usual, atol=1e-6)


def test_attention_finds_what_a_decoder_wrapped_with_it_finds():
    """The decoder is the same; only what long-term memory keeps as keys differs, and here they are made anew."""
    other = build(retriever="attention", long_term_tokens=None)
    memory = written("paper", [200])
    model = memory.engine.model
    seen = {}
    make = partial(WatchingMechanism, seen=seen)
    with torch.no_grad(), reading_as(model, retriever=retriever_for(model, "attention"), make=make):
        model(input_ids=prompts(1), memory=memory)
    own = other.mplus_engine.mechanism.additions.retriever
    for layer, one in seen.items():
        hidden = memory.stores[0].gather(layer, memory.stores[0].ids(layer)).hidden
        norm = other.model.layers[layer].input_layernorm
        with torch.no_grad():
            keys = own.project_keys(layer, norm(hidden))
            scores = own.score(layer, own.project_queries(layer, one.hidden), one.mask, keys[None])[0]
        best = memory.stores[0].ids(layer)[scores.argsort(descending=True)[:K0]]
        assert sorted(one.found[0].ids.tolist()) == sorted(best.tolist())
