"""Activations kept, recomputed and swapped: gradients, and bytes by the closed formula."""

from __future__ import annotations

import gc
from types import MethodType

import pytest
import torch

from benchmarks.quality.architectures.decoders import BY_NAME
from mplus.errors import ConfigError, HostMemoryError, InputError, NotSupported
from mplus.testing.rounding import allowed
from mplus.training import manage_activations
from mplus.training.activations.layout import SavedLayout
from mplus.training.activations.managed import ActivationPlan
from mplus.training.activations.planning import LayerBytes, held_bytes, recomputed_tokens
from mplus.training.recipe.files import read_recipe
from tests.training.activations.tiny_llama import (
    BATCH,
    TOKENS,
    WAYS,
    build,
    equal,
    gradients,
    ids,
    layer_numbers,
)

SHARES = (0, 0.25, 0.5, 0.75, 1)


def sizes(item: int = 4) -> LayerBytes:
    return LayerBytes(*(BATCH * TOKENS * item * numbers for numbers in layer_numbers()))


@pytest.mark.parametrize("layers", [4, 8, 16])
def test_bytes_and_tokens_are_those_of_the_formula(layers):
    model = build(layers)
    kept, held, _ = gradients(model, "keep")
    assert held == (layers * sizes().total, 0)
    for way, share in [("recompute", None), ("swap", None), *(("memo", share) for share in SHARES)]:
        found, held, counter = gradients(model, way, share)
        assert held == held_bytes(sizes(), mode=way, layers=layers, tokens=TOKENS, share=share or 0)
        expected = recomputed_tokens(mode=way, layers=layers, batch=BATCH, tokens=TOKENS, share=share or 0)
        assert counter.recomputed_tokens == expected
        assert (counter.device, counter.host) == (0, 0)
        assert (counter.peak_device, counter.peak_host) == held
        if way != "memo" or share in {0, 1}:
            assert equal(found, kept)
        if layers == 16 and way != "keep":
            assert held[0] <= 0.15 * layers * sizes().total


def test_shares_between_differ_by_rounding():
    """Products of few rows may round otherwise; the allowance is measured against the same in float64."""
    kept, exact = gradients(build(), "keep")[0], gradients(build(dtype=torch.float64), "keep")[0]
    for share in (0.25, 0.5, 0.99):
        found = gradients(build(), "memo", share)[0]
        for name, gradient in found.items():
            assert float((gradient - kept[name]).abs().max()) <= allowed(kept[name], exact[name]), name
        double = gradients(build(dtype=torch.float64), "memo", share)[0]
        for name, gradient in double.items():
            largest = float(exact[name].abs().max())
            assert float((gradient - exact[name]).abs().max()) <= 64 * torch.finfo(torch.float64).eps * largest, name


@pytest.mark.parametrize(("way", "share"), WAYS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dropout_is_drawn_again(way, share, attention):
    model = build(attention_dropout=0.3, attn_implementation=attention)
    kept = gradients(model, "keep")[0]
    assert equal(gradients(model, way, share)[0], kept)
    after = torch.rand(1)
    gradients(model, "keep")
    assert torch.equal(torch.rand(1), after), "the generator goes on as if nothing had been drawn again"


def test_a_decoder_is_as_before_afterwards():
    model = build()
    with manage_activations(model, "memo", swapped_share=0.5):
        assert model.config.use_cache is False
        with pytest.raises(ConfigError, match="managed already"), manage_activations(model, "keep"):
            pass
        with torch.no_grad():
            model(ids())
    assert model.config.use_cache is True
    assert model.config._attn_implementation == "sdpa"
    assert all("forward" not in layer.__dict__ for layer in model.model.layers)


def test_too_few_host_bytes_say_how_many_are_needed():
    model, layers = build(8), 8
    for way, share in (("swap", None), ("memo", 0.5), ("memo", "auto")):
        used = 0 if share == "auto" else share or 0
        _, needed = held_bytes(sizes(), mode=way, layers=layers, tokens=TOKENS, share=used)
        with pytest.raises(HostMemoryError, match=rf"host_bytes must be at least {needed} .*got {needed - 1}"):
            gradients(model, way, share, host_bytes=needed - 1)
        gradients(model, way, share, host_bytes=needed)


def test_auto_swaps_from_the_second_step_on_what_the_host_may_take():
    model, layers = build(8), 8
    host = held_bytes(sizes(), mode="memo", layers=layers, tokens=TOKENS, share=0.5)[1]
    plan = ActivationPlan("memo", "auto", host)
    held = []
    for _ in range(2):
        with plan.applied(model):
            loss = model(input_ids=ids(), labels=ids()).loss
        held.append(plan.counter.host)
        loss.backward()
    assert held == [
        held_bytes(sizes(), mode="memo", layers=layers, tokens=TOKENS, share=share)[1] for share in (0, 0.5)
    ]


def test_a_longer_text_stays_within_what_auto_may_take():
    model = build(8)
    plan = ActivationPlan("memo", "auto", held_bytes(sizes(), mode="memo", layers=8, tokens=TOKENS, share=0.5)[1])
    for tokens in (TOKENS // 2, TOKENS // 2, TOKENS):
        with plan.applied(model):
            loss = model(input_ids=ids(tokens=tokens), labels=ids(tokens=tokens)).loss
        assert plan.counter.host <= plan.host_bytes
        loss.backward()


def test_nothing_is_held_once_the_loss_is_gone():
    model = build()
    with manage_activations(model, "memo", swapped_share=0.5) as counter:
        loss = model(input_ids=ids(), labels=ids()).loss
    gc.disable()
    try:
        assert counter.host > 0
        del loss
        assert (counter.device, counter.host) == (0, 0), "not even until cycles are collected"
    finally:
        gc.enable()


def test_a_layer_that_mixes_tokens_outside_of_attention_is_refused():
    model = build()
    layer = model.model.layers[0]
    plain = type(layer).forward

    def shifted(self, hidden_states, **kwargs):
        return plain(self, hidden_states + 0.1 * hidden_states.roll(1, 1), **kwargs)

    layer.forward = MethodType(shifted, layer)
    kept = gradients(model, "keep")[0]
    assert equal(gradients(model, "memo", 0)[0], kept)
    with pytest.raises(NotSupported, match="something else of the last 6 tokens"):
        gradients(model, "memo", 0.5)
    assert layer.__dict__["forward"].__func__ is shifted


def test_what_cannot_be_recomputed_is_refused():
    model = build()
    with manage_activations(model, "recompute"), pytest.raises(InputError, match="use_cache=False"):
        model(ids(), use_cache=True)
    model.gradient_checkpointing_enable()
    with pytest.raises(ConfigError, match="gradient checkpointing of transformers must be off"):
        gradients(model, "memo", 0.5)
    with pytest.raises(NotSupported, match="no decoder layers"), manage_activations(torch.nn.Linear(2, 2), "keep"):
        pass


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("hold", None, None), "activations must be one of 'keep', 'recompute', 'swap', 'memo', got 'hold'"),
        (("memo", 1.5, None), "swapped_share must be a number from 0 to 1, or 'auto', got 1.5"),
        (("swap", 0.5, None), "swapped_share must be left out where activations are not 'memo'"),
        (("recompute", None, 10), "host_bytes must be left out"),
        (("memo", None, 0), "host_bytes must be a whole number of at least 1"),
    ],
)
def test_settings_that_break_a_rule_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ActivationPlan(*settings)


@pytest.mark.parametrize("name", ["phi3", "gpt2", "mixtral", "falcon-new", "gemma3"])
def test_decoders_of_other_kinds(name):
    """Fused projections, experts, attention that no function is called for, and windows."""
    model = BY_NAME[name].build(0).train()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    kept, _, _ = gradients(model, "keep")
    for way, share in WAYS:
        if share == 0.5 and name == "falcon-new":
            with pytest.raises(NotSupported, match="calls no attention function of transformers"):
                gradients(model, way, share)
        else:
            assert equal(gradients(model, way, share)[0], kept), (way, share)


def layouts():
    """Yield tensors of two texts of three tokens that lie in memory in different ways."""
    hidden = torch.arange(96.0).view(2, 3, 16)
    yield hidden
    yield hidden.view(2, 3, 4, 4).transpose(1, 2)
    yield hidden[..., 4:12]
    yield hidden.view(6, 16).T
    yield torch.arange(24.0).view(2, 1, 3, 4).expand(2, 5, 3, 4)
    yield torch.arange(24.0).as_strided((2, 1, 3, 4), (12, 4, 4, 1))
    yield torch.arange(48.0).view(2, 3, 8)[..., 2:6].unsqueeze(1).expand(2, 5, 3, 4)
    yield torch.arange(7)


@pytest.mark.parametrize("tensor", list(layouts()), ids=lambda tensor: f"{list(tensor.shape)} {tensor.stride()}")
def test_a_tensor_comes_back_as_it_lay_in_memory(tensor):
    """An attention function on a CPU reads wrong numbers in backward where keys of one head for several lie apart."""
    layout = SavedLayout.of(tensor, 2, 3)
    numbers = layout.in_memory_order(tensor)
    if layout.blocks is not None:
        numbers = layout.by_token(tensor, 2, 3)
        assert numbers.shape[:3] == (2, layout.blocks, 3)
    back = layout.restore(numbers.clone(memory_format=torch.contiguous_format))
    assert torch.equal(back, tensor)
    assert back.stride() == tensor.stride()


@pytest.mark.parametrize(("value", "instead"), [(True, "recompute"), (False, "keep")])
def test_a_recipe_with_the_earlier_setting_is_told_the_new_one(value, instead):
    message = f"optimizer: gradient_checkpointing is called activations now, .* write activations = '{instead}'"
    with pytest.raises(ConfigError, match=message):
        read_recipe("recall-tiny", settings={"optimizer.gradient_checkpointing": value})
