"""The cache layer that keeps memory in front of its text, against a ``DynamicLayer`` and plain joining."""

from __future__ import annotations

import copy
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from benchmarks.quality.architectures.decoders import BY_NAME
from benchmarks.quality.architectures.retrofitted import retrofit
from mplus.backends import BACKENDS
from mplus.backends.base import AttentionRequest, Segment
from mplus.hf.retrofit import memory_cache
from mplus.hf.retrofit.memory_cache import MemoryCacheLayer, memory_in_cache
from tests.hf.references import TOLERANCE, error, ids, stir

pytestmark = pytest.mark.two_computations


def states(tokens: int, seed: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(batch, 3, tokens, width, generator=made) for width in (4, 5))
    return keys, values


def segment(rows: int, seed: int, batch: int = 2) -> Segment:
    return Segment(*states(rows, seed, batch))


def same_text(layer: MemoryCacheLayer, plain: DynamicLayer) -> None:
    assert torch.equal(layer.keys, plain.keys)
    assert torch.equal(layer.values, plain.values)
    assert layer.get_seq_length() == plain.get_seq_length()


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.integers(1, 70)),
        st.tuples(st.just("join"), st.integers(0, 2)),
        st.tuples(st.just("crop"), st.integers(0, 3)),
        st.tuples(st.just("reorder"), st.permutations([0, 1])),
        st.tuples(st.just("inference"), st.integers(1, 3)),
        st.tuples(st.just("copy"), st.just(0)),
    ),
    max_size=12,
)


@given(steps=STEPS)
def test_any_use_leaves_the_text_of_a_dynamic_layer_behind_the_memory(steps: list[tuple[str, Any]]) -> None:
    layer, plain, memories = MemoryCacheLayer(), DynamicLayer(), [(segment(n, n),) for n in (3, 1, 7)]
    with torch.no_grad():
        for number, (what, size) in enumerate([("update", 2), *steps]):
            if what == "update":
                new = states(size, number)
                layer.update(*new)
                plain.update(*new)
            elif what == "inference":
                with torch.inference_mode():
                    new = states(size, number)
                    layer.update(*new)
                    plain.update(*new)
                    layer.behind(memories[0])
            elif what == "crop" and size < plain.get_seq_length():
                layer.crop(-size)
                plain.crop(-size)
            elif what == "reorder":
                layer.reorder_cache(torch.tensor(size))
                plain.reorder_cache(torch.tensor(size))
            elif what == "copy":
                before = layer.keys.clone()
                twin = copy.deepcopy(layer)
                twin.update(*states(1, 99))
                assert torch.equal(layer.keys, before)
            elif what == "join":
                (memory,) = memories[size]
                keys, values = layer.behind(memories[size])
                assert torch.equal(keys, torch.cat([memory.keys, plain.keys], 2))
                assert torch.equal(values, torch.cat([memory.values, plain.values], 2))
            same_text(layer, plain)


def test_tokens_are_written_into_the_room_and_memory_is_copied_once() -> None:
    layer, memory = MemoryCacheLayer(), (segment(5, 1), segment(2, 2))
    with torch.no_grad():
        layer.update(*states(3, 3))
        first, _ = layer.behind(memory)
        for step in range(memory_cache.ROOM):
            layer.update(*states(1, step))
            again, _ = layer.behind(memory)
            assert again.data_ptr() == first.data_ptr()
        layer.update(*states(1, 0))
        again, _ = layer.behind(memory)
    assert again.data_ptr() != first.data_ptr()
    assert torch.equal(again[:, :, :10], first[:, :, :10])


def test_gradients_reach_the_text_as_in_a_dynamic_layer() -> None:
    layer, leaf = MemoryCacheLayer(), states(3, 1)[0].requires_grad_()
    values = states(3, 1)[1]
    with torch.no_grad():
        layer.update(*states(2, 2))
        layer.update(*states(1, 2))
    layer.update(leaf, values)
    layer.keys.sum().backward()
    assert torch.equal(leaf.grad, torch.ones_like(leaf))  # type: ignore[arg-type]


class Kept:
    """``Joined`` of a request, made anew."""

    worthwhile = True

    def __init__(self, request: AttentionRequest) -> None:
        self.request, self.asked = request, 0

    def keys_values(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.asked += 1
        parts = [(part.keys, part.values) for part in self.request.segments]
        parts.append((self.request.keys, self.request.values))
        keys, values = zip(*parts, strict=True)
        return torch.cat(keys, 2), torch.cat(values, 2)


@pytest.mark.parametrize("name", ["merge", "sdpa", "reference"])
@pytest.mark.parametrize(("length", "window"), [(1, None), (4, None), (1, 2)])
def test_a_backend_may_take_memory_and_text_as_one(name: str, length: int, window: int | None) -> None:
    made = torch.Generator().manual_seed(5)
    queries = torch.randn(2, 6, length, 8, generator=made)
    keys, values = (torch.randn(2, 3, 4, 8, generator=made) for _ in range(2))
    memory = tuple(Segment(*(torch.randn(2, 3, rows, 8, generator=made) for _ in range(2))) for rows in (5, 2))
    apart = AttentionRequest(queries=queries, keys=keys, values=values, scale=0.3, segments=memory, window=window)
    joined = Kept(apart)
    one = AttentionRequest(
        queries=queries, keys=keys, values=values, scale=0.3, segments=memory, window=window, joined=joined
    )
    backend = BACKENDS.get(name)()
    torch.testing.assert_close(backend.attend(one).output, backend.attend(apart).output)
    assert joined.asked == (name != "merge" or (length == 1 and window is None))


@pytest.mark.parametrize("backend", ["sdpa", "merge"])
@pytest.mark.parametrize("batch", [1, 2])
def test_generation_joins_memory_and_text_once(monkeypatch: Any, backend: str, batch: int) -> None:
    monkeypatch.setattr(memory_cache, "PAYS_AFTER", 3)
    moved = []
    own = MemoryCacheLayer._moved

    def counted(self: Any, segments: Any, tokens: int = 0) -> Any:
        moved.append(len(segments))
        return own(self, segments, tokens)

    pair = retrofit(BY_NAME["llama"], backend=backend)
    stir(pair.wrapped)
    monkeypatch.setattr(MemoryCacheLayer, "_moved", counted)
    memory, prompt = pair.new_memory(batch_size=batch), ids(batch, 9, seed=1)
    memory.write(ids(batch, 72, seed=2))
    options: dict[str, Any] = {"memory": memory, "do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
    found = pair.wrapped.generate(prompt, **options)
    layers = pair.wrapped.config.num_hidden_layers
    with_memory = [count for count in moved if count]
    assert len(with_memory) == layers
    assert torch.equal(found, pair.wrapped.generate(prompt, use_cache=False, **options))


def test_steps_behind_a_kept_prefix_give_the_logits_of_a_whole_read(monkeypatch: Any) -> None:
    monkeypatch.setattr(memory_cache, "PAYS_AFTER", 0)
    pair = retrofit(BY_NAME["llama"], backend="merge")
    stir(pair.wrapped)
    memory, text, cache = pair.memory(), ids(1, 9, seed=1), DynamicCache(config=pair.wrapped.config)
    with torch.no_grad():
        pair.wrapped(text, memory=memory, past_key_values=cache)
        for step in range(3):
            more = ids(1, 1, seed=step + 5)
            logits = pair.wrapped(more, memory=memory, past_key_values=cache).logits
            text = torch.cat([text, more], 1)
        assert isinstance(cache.layers[0], MemoryCacheLayer)
        assert cache.layers[0]._buffer is not None
        reading = cache._mplus_reading
        plain = DynamicCache(config=pair.wrapped.config)
        plain._mplus_reading = copy.deepcopy(reading)
        monkeypatch.setattr("mplus.hf.retrofit.hooks.memory_in_cache", lambda *_: None)
        pair.wrapped(text[:, :9], memory=memory, past_key_values=plain)
        for place in range(9, 12):
            expected = pair.wrapped(text[:, place : place + 1], memory=memory, past_key_values=plain).logits
        assert not isinstance(plain.layers[0], MemoryCacheLayer)
    assert error(logits, expected) < TOLERANCE


def test_what_cannot_be_kept_is_not() -> None:
    memory, ragged = (segment(3, 1),), (Segment(*states(3, 1), torch.tensor([3, 2])),)
    with torch.no_grad():
        assert memory_in_cache(None, 0, memory, 2) is None
        assert memory_in_cache(DynamicCache(offloading=True), 0, memory, 2) is None
        assert memory_in_cache(DynamicCache(), 0, ragged, 2) is None
        assert memory_in_cache(DynamicCache(), 0, memory, 4) is None
        assert memory_in_cache(DynamicCache(), 0, memory, 2) is not None
    assert memory_in_cache(DynamicCache(), 0, memory, 2) is None  # gradients
