"""Reading a memory as if the decoder had been wrapped otherwise."""

from __future__ import annotations

import threading

import pytest
import torch

from mplus.errors import InputError, NotSupported
from mplus.evaluation.retriever_swap import Recency
from mplus.hf.reading.override import WrappedMechanism, mechanism_for_reads, reading_as
from mplus.memory.memory import Memory
from mplus.memory.transaction import Streams
from mplus.stores import STORES
from tests.memory.interruption import interrupted_everywhere
from tests.memory.tiny import K0, assert_same, build, content, difference, ids, prompts, variant, written


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
    empty = [STORES.build(memory.engine.config.store, store.layout) for store in memory.stores]
    waiting = [type(state)(stm=state.stm, pending=tuple(rows.select(torch.arange(0)) for rows in state.pending),
                           clock=state.clock, sources=state.sources, counters=state.counters)
               for state in memory.states]  # fmt: skip
    short = Memory(Streams(memory.engine, waiting, empty, memory.streams.generators, memory.streams.eviction))
    assert torch.equal(logits(memory, retrieved_tokens=0), logits(short))
    assert not torch.equal(logits(memory), logits(short))


def test_the_own_retriever_changes_nothing_and_others_do(memory):
    retriever = memory.engine.mechanism.retriever
    usual = logits(memory)
    assert torch.equal(logits(memory, retriever=retriever), usual)
    assert torch.equal(logits(memory, retrieved_tokens=K0), usual)
    assert not torch.equal(logits(memory, retriever=Recency(retriever.shape)), usual)
    assert not torch.equal(logits(memory, query_tokens=1), usual)
    assert torch.equal(logits(memory), usual)


def test_recency_brings_back_the_newest_rows():
    memory = written("paper", [200])
    with reading_as(memory.engine.model, retriever=Recency(memory.engine.mechanism.retriever.shape)):
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


def test_blocks_of_two_threads_that_overlap_leave_nothing_behind():
    """A block that ends after another one, which began later, once put that one's settings back for good."""
    memory = written("paper", [200])
    usual, short = logits(memory), logits(memory, retrieved_tokens=0)
    both, left = threading.Event(), threading.Event()
    inside, errors = {}, []

    def read(name, retrieved_tokens, wait, tell, after):
        try:
            with reading_as(memory.engine.model, retrieved_tokens=retrieved_tokens):
                tell.set()
                assert wait.wait(60)
                inside[name] = logits(memory)
            if after is not None:
                after.set()
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    begun = threading.Event()
    first = threading.Thread(target=read, args=("first", 0, both, begun, left))
    first.start()
    assert begun.wait(60)
    assert torch.equal(logits(memory), usual), "other threads read as always"
    second = threading.Thread(target=read, args=("second", 0, left, both, None))
    second.start()
    first.join()
    second.join()
    assert errors == []
    assert torch.equal(inside["first"], short)
    assert torch.equal(inside["second"], short)
    assert torch.equal(logits(memory), usual)


def test_what_is_written_inside_is_written_as_always():
    memory, other = written("paper", [200]), written("paper", [200])
    text = ids(60, 5)
    other.write(text)
    with reading_as(memory.engine.model, retriever=Recency(memory.engine.mechanism.retriever.shape)):
        memory.write(text)
    assert_same(memory, other)


def test_blocks_are_nested_and_may_be_left_in_any_order():
    engine = variant("paper").mplus_engine
    outer, inner = (reading_as(engine.model, **settings) for settings in ({"retrieved_tokens": 2}, {"query_tokens": 3}))
    outer.__enter__()
    inner.__enter__()
    config = mechanism_for_reads(engine).config
    assert (config.retrieved_tokens, config.query_tokens) == (2, 3)
    outer.__exit__(None, None, None)
    assert mechanism_for_reads(engine).config == config
    inner.__exit__(None, None, None)
    assert mechanism_for_reads(engine) is engine.mechanism
    assert mechanism_for_reads(variant("published").mplus_engine) is variant("published").mplus_engine.mechanism


def test_an_interrupt_at_any_line_leaves_the_block():
    engine = variant("paper").mplus_engine

    def read():
        with reading_as(engine.model, retrieved_tokens=0):
            assert mechanism_for_reads(engine).config.retrieved_tokens == 0

    places = list(map(int, _checked(interrupted_everywhere(lambda: None, read, "hf/reading/override.py"), engine)))
    assert len(places) > 20, "the whole of it was interrupted"


def _checked(places, engine):
    for place in places:
        assert mechanism_for_reads(engine) is engine.mechanism, f"interrupted before line {place}"
        yield place


def test_a_mechanism_without_retrieval():
    retriever = variant("paper").mplus_engine.mechanism.retriever
    model = variant("memoryllm")
    with pytest.raises(NotSupported, match="'memoryllm' has no retriever"), reading_as(model, retriever=retriever):
        raise AssertionError
    model = build(mechanism="memoryllm", adapters=None)
    memory = model.new_memory()
    memory.write(ids(48))
    with torch.no_grad(), reading_as(model, around=Silent):
        silent = model(input_ids=prompts(1), memory=memory).logits
    with torch.no_grad():
        assert torch.equal(silent, model(input_ids=prompts(1)).logits)


class Silent(WrappedMechanism):
    def prefix(self, *given):
        return None


def test_one_mechanism_in_front_of_another_follows_the_blocks_inside(memory):
    usual, one_token = logits(memory), logits(memory, query_tokens=1)
    model = memory.engine.model
    with reading_as(model, around=WrappedMechanism):
        assert torch.equal(logits(memory), usual)
        assert torch.equal(logits(memory, query_tokens=1), one_token)
        assert isinstance(mechanism_for_reads(memory.engine), WrappedMechanism)
