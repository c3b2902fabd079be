"""The oracle against a model written by hand, and its basic properties on every architecture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from benchmarks.quality.architectures import oracle
from benchmarks.quality.architectures.decoders import BY_NAME, HYBRIDS, PURE, VOCAB_SIZE, WINDOW, Architecture
from tests.helpers.architectures import every
from tests.references.llama import LlamaReference

if TYPE_CHECKING:
    from collections.abc import Iterator

K = 4
"""Rows written per chunk."""

pytestmark = [pytest.mark.usefixtures("_no_grad"), pytest.mark.two_computations]


@pytest.fixture
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def draw_ids(length: int, seed: int = 1) -> Tensor:
    return torch.randint(2, VOCAB_SIZE, (1, length), generator=torch.Generator().manual_seed(seed))


def draw_rows(model: PreTrainedModel, rows: int, seed: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    return [torch.randn(rows, config.hidden_size, generator=generator) for _ in range(config.num_hidden_layers)]


@pytest.fixture(params=["llama", "mistral-sliding"])
def by_hand(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, LlamaReference]:
    model = BY_NAME[request.param].build(attn_implementation="eager")
    return model, LlamaReference(model, window=WINDOW if request.param == "mistral-sliding" else None)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


class TestAgainstHandWrittenModel:
    @pytest.mark.parametrize("rows", [0, 1, 9])
    @pytest.mark.parametrize("length", [1, 12])
    def test_read(self, by_hand: tuple[PreTrainedModel, LlamaReference], rows: int, length: int) -> None:
        model, reference = by_hand
        ids, memory = draw_ids(length), draw_rows(model, rows)
        expected = reference.read(ids[0], lambda layer, _: memory[layer])
        assert_close(oracle.read(model, ids, memory)[0], expected)

    def test_read_with_fewer_rows_in_some_layers(self, by_hand: tuple[PreTrainedModel, LlamaReference]) -> None:
        model, reference = by_hand
        ids, memory = draw_ids(12), [rows[:count] for rows, count in zip(draw_rows(model, 9), (9, 0, 5), strict=True)]
        expected = reference.read(ids[0], lambda layer, _: memory[layer])
        assert_close(oracle.read(model, ids, memory)[0], expected)

    def test_read_with_retrieval(self, by_hand: tuple[PreTrainedModel, LlamaReference]) -> None:
        model, reference = by_hand
        ids, pool = draw_ids(12), draw_rows(model, 40)

        def nearest(layer: int, text: Tensor) -> Tensor:
            scores = pool[layer] @ text.reshape(-1, text.shape[-1]).mean(0)
            return pool[layer][scores.topk(7).indices.sort().values]

        expected = reference.read(ids[0], nearest)
        assert_close(oracle.read_with_retrieval(model, ids, nearest, rows=7)[0], expected)

    @pytest.mark.parametrize("context", [0, 2, 4])
    @pytest.mark.parametrize("length", [1, 3, 5, 8, 12])
    @pytest.mark.parametrize("k", [K, WINDOW + 2])
    def test_write(self, by_hand: tuple[PreTrainedModel, LlamaReference], length: int, context: int, k: int) -> None:
        model, reference = by_hand
        ids, begin, old = draw_ids(length), draw_rows(model, 1, seed=3), draw_rows(model, context, seed=4)
        mark = draw_rows(model, 1, seed=5)[0][0]
        expected = reference.write(ids[0], begin, old, mark=mark, k=k)
        actual = oracle.write(model, ids, begin, old, mark=mark, k=k)
        assert [len(rows) for rows in actual] == [min(k, context + length)] * len(expected)
        for rows, expected_rows in zip(actual, expected, strict=True):
            assert_close(rows, expected_rows)


@every()
def test_without_memory_nothing_changes(architecture: Architecture) -> None:
    model, ids = architecture.build(attn_implementation="eager"), draw_ids(20)
    expected = model(ids).logits
    assert_close(oracle.read(model, ids, draw_rows(model, 0)), expected)


@every()
def test_memory_matters_and_leaves_no_trace(architecture: Architecture) -> None:
    model, ids = architecture.build(attn_implementation="eager"), draw_ids(20)
    memory, plain = draw_rows(model, 9), model(ids).logits
    first = oracle.read(model, ids, memory)
    assert (first - plain)[:, -1].abs().max() >= 1
    assert torch.equal(oracle.read(model, ids, memory), first)
    assert torch.equal(architecture.build(attn_implementation="eager")(ids).logits, plain)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@every()
def test_every_layer_shows_its_memory_to_all_text(architecture: Architecture) -> None:
    model, ids = architecture.build(attn_implementation="eager"), draw_ids(20)
    memory, other = draw_rows(model, 9), draw_rows(model, 9, seed=6)
    logits = oracle.read(model, ids, memory)
    for layer in range(len(memory)):
        changed = oracle.read(model, ids, [*memory[:layer], other[layer], *memory[layer + 1 :]])
        assert (changed - logits).abs().amax(-1).min() > 1e-3


@every()
def test_logits_leave_room_for_tolerances(architecture: Architecture) -> None:
    model, ids = architecture.build(attn_implementation="eager"), draw_ids(20)
    assert 1 < oracle.read(model, ids, draw_rows(model, 9)).std() < 3


@every()
def test_retrieval_sees_what_attention_sees(architecture: Architecture) -> None:
    """Constant retrieval is a plain read, and layer 0 hands out what its attention gets in a plain call."""
    model, ids = architecture.build(attn_implementation="eager"), draw_ids(20)
    memory = draw_rows(model, 9)
    received: list[Tensor] = []

    def constant(layer: int, text: Tensor) -> Tensor:
        received.append(text)
        return memory[layer]

    assert torch.equal(oracle.read_with_retrieval(model, ids, constant, rows=9), oracle.read(model, ids, memory))
    assert [text.shape for text in received] == [(1, 20, model.config.hidden_size)] * len(memory)
    taken: list[Tensor] = []
    layer = oracle.decoder_layers(model)[0]
    handle = oracle._attention_of(layer).register_forward_pre_hook(
        lambda _, args, kwargs: taken.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    model(ids)
    handle.remove()
    assert_close(received[0], taken[0])


@every()
@pytest.mark.parametrize("length", [3, 12])
def test_write_uses_all_its_inputs(architecture: Architecture, length: int) -> None:
    model, ids = architecture.build(attn_implementation="eager"), draw_ids(length)
    begin, context = draw_rows(model, 1, seed=3), draw_rows(model, K, seed=4)
    mark = draw_rows(model, 1, seed=5)[0][0]
    new = oracle.write(model, ids, begin, context, mark=mark, k=K)
    assert [rows.shape for rows in new] == [(K, model.config.hidden_size)] * len(begin)
    variants = {
        "ids": oracle.write(model, draw_ids(length, seed=7), begin, context, mark=mark, k=K),
        "begin": oracle.write(model, ids, draw_rows(model, 1, seed=8), context, mark=mark, k=K),
        "context": oracle.write(model, ids, begin, draw_rows(model, K, seed=9), mark=mark, k=K),
        "newest context row": oracle.write(
            model, ids, begin, [torch.cat([c[:-1], -c[-1:]]) for c in context], mark=mark, k=K
        ),
        "mark": oracle.write(model, ids, begin, context, mark=2 * mark, k=K),
    }
    of_text = slice(-length, None)  # also where the chunk is short and its context is transformed with it
    for name, rows in variants.items():
        assert all((a - b)[of_text].abs().max() > 1e-2 for a, b in zip(rows, new, strict=True)), name


def test_learned_positions_of_the_text_stay() -> None:
    """GPT-2 with keys and values of the memory put into its cache by hand."""
    model, ids = BY_NAME["gpt2"].build(attn_implementation="eager"), draw_ids(12)
    memory, cache = draw_rows(model, 9), DynamicCache()
    for index, (layer, rows) in enumerate(zip(model.transformer.h, memory, strict=True)):
        _, keys, values = layer.attn.c_attn(layer.ln_1(rows[None])).view(1, 9, 3, 4, 8).transpose(1, 3).unbind(2)
        cache.update(keys, values, index)
    expected = model(ids, past_key_values=cache, position_ids=torch.arange(12)[None]).logits
    assert_close(oracle.read(model, ids, memory), expected)


def test_greedy_generation_is_repeated_reading() -> None:
    model, ids = BY_NAME["llama"].build(attn_implementation="eager"), draw_ids(5)
    memory = draw_rows(model, 9)
    out = oracle.generate_greedy(model, ids, memory, steps=6)
    assert out.shape == (1, 11)
    assert torch.equal(out[:, :5], ids)
    assert torch.equal(oracle.read(model, out, memory)[0, 4:-1].argmax(-1), out[0, 5:])
    assert not torch.equal(oracle.generate_greedy(model, ids, draw_rows(model, 0), steps=6), out)


def test_gradients_reach_the_memory() -> None:
    model, ids = BY_NAME["llama"].build(attn_implementation="eager"), draw_ids(5)
    with torch.enable_grad():
        mark = torch.zeros(model.config.hidden_size, requires_grad=True)
        new = oracle.write(model, ids, draw_rows(model, 1), draw_rows(model, 0), mark=mark, k=K)
        oracle.read(model, ids, new).square().mean().backward()
    assert mark.grad is not None
    assert mark.grad.abs().max() > 0


def test_dynamic_frequencies_do_not_depend_on_earlier_calls() -> None:
    model, ids = BY_NAME["llama-dynamic"].build(attn_implementation="eager"), draw_ids(12)
    expected = oracle.read(model, ids, draw_rows(model, 9))
    model(draw_ids(60))
    assert torch.equal(oracle.read(model, ids, draw_rows(model, 9)), expected)


@every(HYBRIDS)
def test_hybrids_are_outside(architecture: Architecture) -> None:
    model = architecture.build(attn_implementation="eager")
    with pytest.raises(ValueError, match="attention modules"):
        oracle.read(model, draw_ids(5), draw_rows(model, 1))


def test_other_attention_is_refused() -> None:
    model = BY_NAME["llama"].build(attn_implementation="sdpa")
    with pytest.raises(ValueError, match="eager"):
        oracle.read(model, draw_ids(5), draw_rows(model, 1))


@every([a for a in PURE if a.sdpa])
def test_sdpa_computes_the_same(architecture: Architecture) -> None:
    ids = draw_ids(20)
    eager, sdpa = (architecture.build(attn_implementation=i)(ids).logits for i in architecture.implementations)
    assert_close(sdpa, eager)


def test_seed_decides_the_weights() -> None:
    architecture, ids = BY_NAME["llama"], draw_ids(5)
    before = torch.random.get_rng_state()
    assert torch.equal(architecture.build(3)(ids).logits, architecture.build(3)(ids).logits)
    assert not torch.equal(architecture.build(3)(ids).logits, architecture.build(4)(ids).logits)
    assert torch.equal(torch.random.get_rng_state(), before)
