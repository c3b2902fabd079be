"""Reading a memory as if the decoder had been wrapped otherwise."""

from __future__ import annotations

import pytest
import torch

from mplus.errors import InputError, NotSupported
from mplus.evaluation.stand_ins import Recency
from mplus.hf.reading_as import reading_as
from mplus.memory.memory import Memory
from mplus.stores.build import build_store
from tests.memory.tiny import K0, content, difference, ids, prompts, variant, written


@pytest.fixture(params=["paper", "published"])
def memory(request):
    """Three streams with far more rows than the STM holds, and than a read brings back."""
    return written(request.param, [200, 150, 120])


@torch.no_grad()
def logits(memory, **settings):
    model, text = memory.engine.model, prompts(3)
    if not settings:
        return model(input_ids=text, memory=memory).logits
    with reading_as(model, **settings):
        return model(input_ids=text, memory=memory).logits


def test_without_long_term_rows_it_is_a_read_of_the_short_term_memory_alone(memory):
    empty = [build_store(memory.engine.config.store, store.layout) for store in memory.stores]
    waiting = [type(state)(stm=state.stm, pending=tuple(rows.select(torch.arange(0)) for rows in state.pending),
                           clock=state.clock, sources=state.sources, counters=state.counters)
               for state in memory.states]  # fmt: skip
    short = Memory(memory.engine, waiting, empty, memory.generators, memory.eviction)
    assert torch.equal(logits(memory, retrieved_tokens=0), logits(short))
    assert not torch.equal(logits(memory), logits(short))


def test_the_own_retriever_changes_nothing_and_others_do(memory):
    retriever = memory.engine.mechanism.additions.retriever
    usual = logits(memory)
    assert torch.equal(logits(memory, retriever=retriever), usual)
    assert torch.equal(logits(memory, retrieved_tokens=K0), usual)
    assert not torch.equal(logits(memory, retriever=Recency(retriever.shape)), usual)
    assert not torch.equal(logits(memory, query_tokens=1), usual)
    assert torch.equal(logits(memory), usual)


def test_recency_brings_back_the_newest_rows():
    memory = written("paper", [200])
    with reading_as(memory.engine.model, retriever=Recency(memory.engine.mechanism.additions.retriever.shape)):
        output = memory.engine.model.generate(
            input_ids=prompts(1), memory=memory, max_new_tokens=1, return_dict_in_generate=True, output_sources=True
        )
    for layer, found in enumerate(output.memory_sources[0]):
        births = memory.stores[0].column(layer, "birth").sort().values[-K0:]
        assert [memory.states[0].clock - 1 - row.age for row in found] == births.tolist()


def test_everything_is_as_before_afterwards(memory):
    before, mechanism = content(memory), memory.engine.mechanism
    with pytest.raises(InputError), reading_as(memory.engine.model, retrieved_tokens=1):
        memory.write("")
    assert memory.engine.mechanism is mechanism
    assert difference(content(memory), before) == []
    memory.write([ids(16, seed) for seed in range(3)])


def test_a_mechanism_without_retrieval():
    with pytest.raises(NotSupported, match="'memoryllm' has no retriever"), reading_as(variant("memoryllm")):
        raise AssertionError
