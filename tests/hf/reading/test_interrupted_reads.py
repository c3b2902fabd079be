"""Ctrl-C, or any failure, at any point of a read leaves nothing behind: the next one is what it always was."""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading

import pytest
import torch

from mplus.hf.model.modes import in_eval_mode, with_attention
from mplus.hf.retrofit.context import current_pass
from mplus.mechanisms.mplus import MPlusMechanism
from mplus.memory.recompute import refresh_if_stale
from tests.helpers.modes import on_every_change
from tests.memory.interruption import interrupted_everywhere
from tests.memory.tiny import assert_same, build, ids, prompts, raw, variant, written


@functools.cache
def memory():
    return written("paper", [200])


@torch.no_grad()
def logits(**arguments):
    return variant("paper")(prompts(1), **arguments).logits


@functools.cache
def expected():
    return [logits(), logits(memory=memory()), logits(memory=memory(), retrieve_every=2, query_tokens=2)]


def check():
    """Reads with and without a memory, with and without retrieving anew, are the same bits as before."""
    with torch.no_grad():
        fork = memory().fork()  # nothing is prepared for it
        plain, usual, anew = expected()
        assert current_pass() is None
        assert torch.is_grad_enabled() is False
        assert raw(logits()) == raw(plain)
        for one in (memory(), fork):
            assert raw(logits(memory=one)) == raw(usual)
        assert raw(logits(memory=memory(), retrieve_every=2, query_tokens=2)) == raw(anew)
        assert_same(memory(), fork)


def generate(**arguments):
    return variant("paper").generate(prompts(1), memory=memory(), max_new_tokens=2, **arguments)


def block():
    with variant("paper").reading(memory()):
        logits()


WORK = {
    "forward": lambda: logits(memory=memory()),
    "pieces": lambda: logits(memory=memory(), retrieve_every=2, query_tokens=2),
    "generate": generate,
    "block": block,
    "first": lambda: logits(memory=memory().fork()),
}


@pytest.mark.parametrize("work", WORK)
def test_a_read_that_is_interrupted(work):
    expected()
    interrupted = 0
    for _ in interrupted_everywhere(lambda: None, WORK[work], "/mplus/", most=on_every_change(12, nightly=400)):
        interrupted += 1
        check()
    assert interrupted > 5


class Stop(Exception):
    """What a user's own code raises."""


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["stopping_criteria", "logits_processor", "streamer", "retriever"])
def test_a_callback_that_fails(place, error, monkeypatch):
    calls, retrieve = [], MPlusMechanism.retrieve

    def fail(*args, **_):
        calls.append(place)
        if len(calls) == 2:
            raise error
        if place == "retriever":
            return retrieve(*args)
        return args[1] if place == "logits_processor" else torch.zeros(1, dtype=torch.bool)

    class Streamer:
        put, end = staticmethod(fail), staticmethod(lambda: None)

    expected()
    arguments = {"streamer": Streamer()} if place == "streamer" else {place: [fail]}
    with monkeypatch.context() as patch:
        if place == "retriever":
            patch.setattr(MPlusMechanism, "retrieve", fail)
            arguments = {}
        with pytest.raises(error), variant("paper").reading(memory()):
            generate(**arguments)
    check()


def test_an_interrupt_at_any_line_closes_a_reading_block():
    model, counted = variant("paper"), 0

    def enter():
        with model.reading(memory()):
            pass

    for place in interrupted_everywhere(lambda: None, enter, "hf/reading/open_readings.py", most=200):
        assert model.mplus_engine.readings.current() is None, f"interrupted before line {place}"
        counted += 1
    assert counted > 10


def test_an_interrupt_at_any_line_brings_a_model_back_to_its_mode():
    model = variant("paper")
    model.train()
    modes, attention = [module.training for module in model.modules()], model.config._attn_implementation

    def work():
        with in_eval_mode(model), with_attention(model, "sdpa"):
            pass

    try:
        for place in interrupted_everywhere(lambda: None, work, "hf/model/modes.py", most=60):
            assert [module.training for module in model.modules()] == modes, f"interrupted before line {place}"
            assert model.config._attn_implementation == attention, f"interrupted before line {place}"
    finally:
        model.eval()


def test_a_backward_pass_that_is_interrupted_while_it_computes_layers_anew():
    """The thread was left in the pass of a layer: whatever the decoder then read without a memory, it read with one."""
    model = build()
    own = model.new_memory()
    own.write(ids(60))
    plain = model(prompts(1)).logits
    model.gradient_checkpointing_enable()
    model.train()
    losses = []

    def prepare():
        losses.append(model(prompts(1), memory=own, labels=prompts(1), use_cache=False).loss)

    counted = 0
    for _ in interrupted_everywhere(prepare, lambda: losses.pop().backward(), "hf/retrofit/context.py", most=24):
        counted += 1  # `interrupted_everywhere` looks whether the thread is still in a pass
    assert counted > 10
    model.eval()
    assert raw(model(prompts(1)).logits) == raw(plain)


def test_notes_on_what_was_read_survive_a_read_that_cannot_compute_rows_anew():
    model = build(eviction="lru", memory_rows="both")
    own = model.new_memory()
    own.write(ids(200))
    with torch.no_grad():
        model(prompts(1), memory=own)
    layers = range(own.stores[0].layout.layers)

    def notes(memory):
        return [memory.streams.access_logs[0].times(layer, memory.stores[0].ids(layer)).tolist() for layer in layers]

    before = notes(own)
    assert all(len(set(times)) > 1 for times in before), "some rows were read and others not"
    norm = model.mplus_engine.retrofit.anatomy.specs[-1].norm
    with torch.no_grad():
        norm.weight += 0.5  # keys have to be computed anew

        twins = []

        def prepare():
            twins.append(own.fork())

        def keep_up():
            refresh_if_stale(twins[-1].streams)

        unchanged = 0
        for _ in interrupted_everywhere(prepare, keep_up, "memory/recompute.py", most=20):
            unchanged += twins[-1].version == 0
            assert notes(twins[-1]) == before
        assert unchanged > 10


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_is_not_kept_from_reading_by_threads_of_its_parent(monkeypatch):
    """Locks that a thread held when another one forked, and blocks that it was in, are none of the child's business."""
    model = variant("paper")
    watch, readings = model.mplus_engine.watch, model.mplus_engine.readings
    inside, done = threading.Event(), threading.Event()
    switches = watch.switches

    def slow(*args):
        if threading.current_thread() is thread:
            inside.set()
            done.wait(60)
        return switches(*args)

    def look():
        with model.reading(memory()):
            watch.look()

    expected()
    monkeypatch.setattr(watch, "switches", slow)
    thread = threading.Thread(target=look)
    thread.start()
    assert inside.wait(60)
    child = os.fork()
    if not child:
        try:
            signal.alarm(20)
            blocked = readings.current()
            watch.look()
            os._exit(0 if blocked is None else 2)
        finally:
            os._exit(1)
    done.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
