"""Streams of any mechanism do in training what its memories do: by its own methods, one stream at a time."""

from __future__ import annotations

import math
from collections import Counter
from typing import ClassVar

import pytest
import torch

import mplus
from mplus.errors import ConfigError, InputError, NotSupported
from mplus.mechanisms import MECHANISMS
from mplus.mechanisms.mplus import MPlusMechanism
from mplus.mechanisms.separate_streams import SeparateStreams
from mplus.testing.rounding import InFloat64
from mplus.training import train
from mplus.training.decoder import make_batched_streams, make_streams
from tests.mechanisms.gists import GistMechanism
from tests.memory import tiny
from tests.training.recipes import recipe

SEED, STREAMS = 3, 2


class Derived(MPlusMechanism):
    """M+ of a plug-in, which may have changed any rule: it is called."""

    name = "derived"
    calls: ClassVar[Counter[str]] = Counter()

    def absorb(self, state, update, source, context):
        self.calls["absorb"] += 1
        return super().absorb(state, update, source, context)

    def prefix(self, opened, layer, found, hidden, project):
        self.calls["prefix"] += 1
        return super().prefix(opened, layer, found, hidden, project)


@pytest.fixture(scope="module", autouse=True)
def registered():
    MECHANISMS.register("derived", Derived)
    MECHANISMS.register("gists", GistMechanism)
    yield
    MECHANISMS.unregister("derived")
    MECHANISMS.unregister("gists")


@pytest.fixture(scope="module")
def derived(registered):
    return tiny.build(mechanism="derived").eval()


@pytest.fixture(scope="module")
def gists(registered):
    return tiny.build(mechanism="gists", adapters=None).eval()


def chunks(count, tokens=tiny.CHUNK):
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(2, tiny.VOCAB_SIZE, (STREAMS, tokens), generator=generator) for _ in range(count)]


def write(streams, count, tokens=tiny.CHUNK):
    for number, ids in enumerate(chunks(count, tokens)):
        streams.write(ids, torch.full((STREAMS,), number))


def texts():
    return torch.randint(2, tiny.VOCAB_SIZE, (STREAMS, 2, 5), generator=torch.Generator().manual_seed(1))


def test_a_class_that_derives_from_mplus_is_trained_by_its_own_methods(derived):
    streams = make_streams(derived.mplus_engine, range(STREAMS), seed=SEED)
    assert isinstance(streams, SeparateStreams)
    Derived.calls.clear()
    with torch.no_grad():
        write(streams, 2)
        streams.read(texts())
    assert Derived.calls == {"absorb": 2 * STREAMS, "prefix": derived.mplus_engine.layout.layers}


@pytest.mark.parametrize("tokens", [tiny.CHUNK, 2])
def test_separate_and_batched_streams_hold_and_read_the_same(derived, tokens):
    """Two computations of one memory: as many states and stores as streams, and one tensor per layer."""
    engine = derived.mplus_engine
    separate = make_streams(engine, range(STREAMS), seed=SEED)
    plain = tiny.build().eval()
    plain.load_state_dict(derived.state_dict())
    batched = make_batched_streams(plain.mplus_engine, range(STREAMS), seed=SEED, long_term_tokens=tiny.CAPACITY)
    with torch.no_grad():
        write(separate, 14, tokens)
        write(batched, 14, tokens)
        separate_read, batched_read = (streams.read(texts()) for streams in (separate, batched))
        for streams, whole in ((separate, separate_read), (batched, batched_read)):
            kept = streams.read(texts(), logits_to_keep=2).logits
            torch.testing.assert_close(kept, whole.logits[:, :, -2:], rtol=0, atol=tiny.rounding())
    assert separate.clock == batched.clock
    for layer in range(engine.layout.layers):
        for row in range(STREAMS):
            stm = separate.states[row].stm[layer]
            assert torch.equal(stm.birth, batched.stm_birth[layer][row])
            torch.testing.assert_close(stm.hidden, batched.stm[layer][row], rtol=0, atol=tiny.rounding())
            births = separate.stores[row].column(layer, "birth")
            assert torch.equal(births.sort().values, batched.ltm[layer].birth[row].sort().values)
    torch.testing.assert_close(separate_read.logits, batched_read.logits, rtol=0, atol=tiny.rounding())


def test_gradients_of_separate_and_batched_streams_are_the_same(registered):
    gradients = []
    for mechanism in ("derived", "mplus"):
        # In float64: in float32 what cancels to little is as far apart as what it is a sum of, by the processor.
        model = tiny.build(dtype=torch.float64, mechanism=mechanism).eval()
        streams = make_streams(model.mplus_engine, range(STREAMS), seed=SEED)
        with InFloat64():
            write(streams, 1)
            loss = streams.read(texts()).logits.square().mean()
            names, weights = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
            found = torch.autograd.grad(loss, weights, allow_unused=True)
        gradients.append({name: grad for name, grad in zip(names, found, strict=True) if grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any(".write" in name for name in gradients[0]), "the writer learns from the read"
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "changes",
    [
        {"eviction": {"name": "ttl", "lifetime": 3.0}},
        {"eviction": "reservoir"},
        {"mechanism": {"name": "mplus", "merge_every": 3, "lifetime": 4.0}},
        {"mechanism": {"name": "mplus", "short_ltm": "tile"}},
    ],
    ids=str,
)
def test_eviction_and_options_are_followed(changes):
    model = tiny.build(**changes).eval()
    memory = model.new_memory(batch_size=STREAMS, seed=SEED)
    streams = make_streams(model.mplus_engine, range(STREAMS), seed=SEED)
    assert isinstance(streams, SeparateStreams)
    with torch.no_grad():
        write(streams, 14)
        for number, ids in enumerate(chunks(14)):
            memory.write_chunk(ids, source=f"chunk {number}")
        read = streams.read(texts())
        expected = [model(input_ids=texts()[:, place], memory=memory).logits for place in range(2)]
    for row, view in enumerate(memory.snapshot()):
        for layer in range(3):
            assert torch.equal(view.store.column(layer, "birth"), streams.stores[row].column(layer, "birth"))
            assert torch.equal(view.store.column(layer, "source"), streams.stores[row].column(layer, "source"))
    torch.testing.assert_close(read.logits, torch.stack(expected, 1), rtol=0, atol=tiny.rounding())


def test_a_mechanism_that_shares_nothing_with_mplus_reads_as_its_memory_does(gists):
    memory = gists.new_memory(batch_size=STREAMS, seed=SEED)
    streams = make_streams(gists.mplus_engine, range(STREAMS), seed=SEED)
    with torch.no_grad():
        write(streams, 5)
        for ids in chunks(5):
            memory.write_chunk(ids)
        expected = gists(input_ids=texts()[:, 1], memory=memory).logits
        torch.testing.assert_close(streams.read(texts()).logits[:, 1], expected, rtol=0, atol=tiny.rounding())
        base = gists(input_ids=texts()[:, 1]).logits
    assert not torch.allclose(expected, base, atol=1e-3), "the memory matters"


def test_keys_and_values_are_read_as_their_memory_is():
    """They need the ids of a chunk, and texts that begin where the mechanism says."""
    sizes = {"chunk_tokens": tiny.CHUNK, "min_chunk_tokens": 1, "retrieved_tokens": 48, "long_term_tokens": 80}
    model = tiny.BY_NAME["llama"].build(0)
    model = mplus.wrap(model, {"mechanism": "kv", "adapters": {"rank": 2}, **sizes}).eval()
    memory = model.new_memory(batch_size=STREAMS, seed=SEED)
    streams = make_streams(model.mplus_engine, range(STREAMS), seed=SEED)
    with torch.no_grad():
        write(streams, 3)
        for ids in chunks(3):
            memory.write_chunk(ids)
        read, base = streams.read(texts()).logits, model(input_ids=texts()[:, 1]).logits
        expected = model(input_ids=texts()[:, 1], memory=memory).logits
        torch.testing.assert_close(read[:, 1], expected, rtol=0, atol=tiny.rounding())
        assert not torch.allclose(expected, base, atol=1e-3), "the memory matters"
        one = streams.encode(chunks(1)[0])
        alone = streams.read_update(one, texts(), "read").logits
        memory.reset()
        memory.write_chunk(chunks(1)[0])
        expected = model(input_ids=texts()[:, 1], memory=memory).logits
        torch.testing.assert_close(alone[:, 1], expected, rtol=0, atol=tiny.rounding())


def test_gradients_flow_through_the_rows_of_a_store_until_detached(gists):
    streams = make_streams(gists.mplus_engine, range(STREAMS), seed=SEED)
    weight = gists.get_input_embeddings().weight.requires_grad_(True)
    write(streams, 5)
    assert streams.stores[0].rows[0].hidden.requires_grad
    assert torch.autograd.grad(streams.stores[0].rows[0].hidden.sum(), weight)[0].abs().sum() > 0
    streams.detach()
    held = [*streams.states[0].row_lists()["gists"], *streams.stores[0].rows]
    assert not any(rows.hidden.requires_grad for rows in held)
    weight.requires_grad_(False)


def test_saved_streams_go_on_as_they_would_have(derived, gists):
    for model in (derived, gists):
        streams, twin = (make_streams(model.mplus_engine, range(STREAMS), seed=seed) for seed in (SEED, 99))
        with torch.no_grad():
            write(streams, 9)
            twin.load_state_dict(streams.state_dict())
            for each in (streams, twin):
                write(each, 3)
            assert torch.equal(streams.read(texts()).logits, twin.read(texts()).logits)
        for row in range(STREAMS):
            assert all(map(torch.equal, streams.stores[row].row_ids, twin.stores[row].row_ids))
    with pytest.raises(ConfigError, match="the saved streams must be 2 of the mechanism 'gists', got 1"):
        make_streams(gists.mplus_engine, range(2), seed=0).load_state_dict(
            make_streams(gists.mplus_engine, [0], seed=0).state_dict()
        )


@pytest.mark.parametrize("name", ["derived", "gists"])
def test_mplus_train_calls_a_mechanism_of_a_plugin(name, monkeypatch):
    called: Counter[str] = Counter()
    cls = MECHANISMS.get(name)
    for method in ("write", "absorb", "retrieve", "prefix"):
        inner = getattr(cls, method)

        def counting(self, *args, inner=inner, method=method):
            called[method] += 1
            return inner(self, *args)

        monkeypatch.setattr(cls, method, counting)
    result = train(recipe(("stages.1.retriever_loss",), memory__mechanism=name), steps=3)
    assert result.steps == 6
    assert all(called[method] for method in ("write", "absorb", "retrieve", "prefix")), called
    assert all(map(math.isfinite, result.metrics.values()))


def test_a_retriever_is_trained_on_batched_streams_only():
    with pytest.raises(
        ConfigError, match=r"stages: 1 \(second\): retriever_loss must be left out with memory.mechanism 'derived'"
    ):
        train(recipe(memory__mechanism="derived"))


def test_what_separate_streams_cannot_do_is_refused_by_name(gists, monkeypatch):
    streams = make_streams(gists.mplus_engine, range(STREAMS), seed=0)
    with pytest.raises(InputError, match=r"chunks must be \[2, 1 to chunk_tokens \(16\)\], got \[3, 4\]"):
        streams.write(torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(NotSupported, match="'gists' offer no candidates to a retriever loss"):
        streams.read(texts(), candidates=lambda layer, sources: sources)
    with pytest.raises(ConfigError, match="at least one stream, got none"):
        make_streams(gists.mplus_engine, [], seed=0)
