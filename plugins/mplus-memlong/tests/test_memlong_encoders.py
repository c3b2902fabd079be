"""The key of a group that the decoder itself makes, and whether a question finds what it asks for by it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import mplus
from mplus.evaluation.chat.choice import Choice, choosing
from mplus.evaluation.tasks.facts import Facts
from mplus.hf.pretrained.shipped import load_recall

Ids = Callable[..., Tensor]


@pytest.mark.parametrize(("layer", "averaged"), [(None, 1), (0, 0), (3, 3)])
def test_keys_are_means_of_what_one_layer_receives(wrap: Any, ids: Ids, layer: int | None, averaged: int) -> None:
    """Left out, that of a quarter of the depth: of four layers, the second."""
    model = wrap(memory_layer=2, encoder_layer=layer)
    memory, told = model.new_memory(), ids(1)
    memory.write(told, source="s")
    with torch.no_grad():
        inputs = mplus.unwrap(model)(told[None], output_hidden_states=True).hidden_states[averaged][0]
    means = torch.stack([part.float().mean(0) for part in inputs.split(4)])
    torch.testing.assert_close(memory.states[0].group_key, normalize(means, dim=-1))


def test_a_question_finds_the_fact_that_it_asks_for_among_many() -> None:
    """By the embeddings of words, where inputs of the layer that is kept find a tenth of the facts."""
    model, tokenizer = load_recall()
    sizes = {"chunk_tokens": 1024, "retrieved_tokens": 32, "adapters": False}
    config = {"mechanism": {"name": "memlong", "memory_layer": 1, "group_tokens": 16}, **sizes}
    model = mplus.wrap(mplus.unwrap(model), mplus.MPlusConfig.from_dict(config), check=False).eval()
    (episode,) = Facts(ages=tuple(range(0, 64, 2)), streams=1, rounds=1, seed=3).episodes()
    # Of what a search finds, words that the tokenizer takes for special are left out.
    told = [passage.text.replace("<other>", "is") for passage in episode.passages]
    memory = model.new_memory(tokenizer=tokenizer)
    memory.write(" ".join(told), source="all")
    assert memory.states[0].groups == len(told) == 63
    found = [(memory.search(one.prompt, k=2), told[one.needs[0]]) for one in episode.questions]
    assert sum(text in [one.text for one in best] for best, text in found) >= 31  # of 32


def test_an_evaluation_sees_what_layers_above_the_first_read(wrap: Any, ids: Ids) -> None:
    """The first layer reads nothing; what was chosen is told by the first one that reads."""
    model = wrap(read_layers=[2], config={"retrieved_tokens": 4})
    memory, seen = model.new_memory(), list[Choice]()
    for name in ("a", "b", "c"):
        memory.write(ids(ord(name), 4), source=name)
    with torch.no_grad(), choosing(model, seen):
        model.generate(ids(ord("b"), 4)[None], memory=memory, max_new_tokens=1, do_sample=False)
    assert seen[0].sources == ("b",)
