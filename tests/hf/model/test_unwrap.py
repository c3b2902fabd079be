"""``unwrap`` leaves nothing behind, and ``wrap`` refuses what it cannot wrap without touching it."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import mplus
from benchmarks.quality.architectures.decoders import BY_NAME, HYBRIDS, PURE, Architecture
from benchmarks.quality.architectures.retrofitted import config_for, retrofit
from mplus.errors import ConfigError, MemoryMismatchError, NotSupported, UnknownNameError
from tests.helpers.architectures import every
from tests.hf.references import ids

TEXT = ids(1, 9)


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything of a module tree that wrapping might change."""
    return {
        name: {
            "class": type(module),
            "attributes": set(module.__dict__),
            "children": list(module._modules),
            "hooks": [len(getattr(module, hooks)) for hooks in HOOKS],
            "training": module.training,
            "parameters": {key: id(parameter) for key, parameter in module._parameters.items()},
            "tensors": [
                (key, tensor.requires_grad, tensor.tolist())
                for key, tensor in (*module._parameters.items(), *module._buffers.items())
                if tensor is not None
            ],
        }
        for name, module in model.named_modules()
    }


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks")


def settled(model: Any) -> dict[str, Any]:
    """The state after a long and a short run: some models keep things of the longest text so far."""
    model(ids(1, 60))
    model(TEXT)
    return state_of(model)


@every((*PURE, *HYBRIDS), representative=True)
def test_unwrapping_restores_every_module(architecture: Architecture) -> None:
    model = architecture.build()
    before, attention = settled(model), model.config._attn_implementation
    keys, logits = list(model.state_dict()), model(TEXT).logits
    assert mplus.wrap(model, config_for(architecture)) is model
    memory = model.new_memory()
    memory.write(ids(1, 30)[0])
    model(TEXT, memory=memory)
    assert mplus.unwrap(model) is model
    assert settled(model) == before
    assert model.config._attn_implementation == attention
    assert list(model.state_dict()) == keys
    assert torch.equal(model(TEXT).logits, logits)
    assert "memory" not in inspect.signature(model.forward).parameters


def test_rounded_frequencies_are_restored() -> None:
    model = BY_NAME["llama"].build()
    before = model(TEXT).logits
    frequencies = model.model.rotary_emb.inv_freq.clone()
    mplus.wrap(model, config_for(BY_NAME["llama"], rope_inv_freq_dtype="bfloat16"))
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies.bfloat16().float())
    assert not torch.equal(model(TEXT).logits, before)
    mplus.unwrap(model)
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    assert torch.equal(model(TEXT).logits, before)


def test_wrapping_again_works_with_another_config() -> None:
    pair = retrofit(BY_NAME["llama"])
    old = pair.memory(chunks=1)
    mplus.unwrap(pair.wrapped)
    with pytest.raises(MemoryMismatchError, match="no longer wrapped"):
        old.write(TEXT)
    mplus.wrap(pair.wrapped, config_for(BY_NAME["llama"], memory_tokens_per_chunk=2))
    memory = pair.wrapped.new_memory()
    memory.write(TEXT)
    assert len(memory.states[0].stm[0]) == 2
    pair.wrapped(TEXT, memory=memory)
    with pytest.raises(MemoryMismatchError, match="another model"):
        pair.wrapped(TEXT, memory=old)


def test_unwrapping_twice_and_wrapping_twice_are_refused() -> None:
    model = mplus.wrap(BY_NAME["llama"].build(), config_for(BY_NAME["llama"]))
    before = state_of(model)
    with pytest.raises(NotSupported, match=r"wrapped already: use mplus\.unwrap"):
        mplus.wrap(model, config_for(BY_NAME["llama"]))
    assert state_of(model) == before
    mplus.unwrap(model)
    with pytest.raises(NotSupported, match="is not wrapped"):
        mplus.unwrap(model)


def test_modes_and_gradients_are_left_alone() -> None:
    """A decoder in training, with one part of it in eval mode and another frozen."""
    architecture = Architecture("gpt2", "gpt2", {**BY_NAME["gpt2"].options, "embd_pdrop": 0.5, "resid_pdrop": 0.5})
    model = architecture.build().train()
    model.transformer.h[1].eval()
    model.transformer.wte.requires_grad_(False)
    modes = {name: module.training for name, module in model.named_modules()}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    quiet = architecture.build()
    for one in (model, quiet):
        mplus.wrap(one, config_for(architecture))
    after = {name.replace(".base_layer", ""): module.training for name, module in model.named_modules()}
    assert {name: after[name] for name in modes} == modes
    assert model.transformer.h[1].attn.c_attn.lora_dropout.training is False
    assert model.transformer.h[0].attn.c_attn.lora_dropout.training is True
    kept = {name.replace(".base_layer", "") for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in kept if ".lora_" not in name and not name.startswith("mplus.")} == trainable
    assert torch.equal(model.mplus.begin, quiet.mplus.begin), "begin rows were taken with dropout"
    memory = model.new_memory()
    memory.write(ids(1, 30)[0])
    assert torch.isfinite(model(TEXT, memory=memory, labels=TEXT).loss)


# ---------------------------------------------------------------- what cannot be wrapped


def unwrappable(kind: str) -> Any:
    sizes = {"vocab_size": 101, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2}
    match kind:
        case "encoder-decoder":
            return AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **sizes, decoder_start_token_id=0))
        case "no head":
            return AutoModel.from_config(BY_NAME["llama"].build().config)
        case "encoder":
            config = AutoConfig.for_model(
                "bert", vocab_size=101, hidden_size=16, num_hidden_layers=2, num_attention_heads=2
            )
            return AutoModel.from_config(config)
        case "flex attention":
            model = BY_NAME["llama"].build()
            model.config._attn_implementation = "flex_attention"
            return model
        case _:
            return nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("encoder-decoder", "T5ForConditionalGeneration is an encoder-decoder"),
        ("no head", "causal language-model head, got LlamaModel"),
        ("encoder", "causal language-model head, got BertModel"),
        ("module", "causal language-model head, got Linear"),
        ("flex attention", "attn_implementation must be one of eager, sdpa, got 'flex_attention'"),
    ],
)
def test_what_cannot_be_wrapped_is_refused_and_left_alone(kind: str, message: str) -> None:
    model = unwrappable(kind)
    before = state_of(model)
    with pytest.raises(NotSupported, match=message):
        mplus.wrap(model)
    assert state_of(model) == before


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"backend": "nothing"}, UnknownNameError),
        ({"store": "nothing"}, UnknownNameError),
        ({"retriever": "nothing"}, UnknownNameError),
        ({"mechanism": "nothing"}, UnknownNameError),
        ({"retriever": {"name": "linear", "width": 0}}, ConfigError),
        ({"adapters": {"target_modules": ["nothing"]}}, ConfigError),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_leaves_the_decoder_alone(changes: dict[str, Any], error: type[Exception]) -> None:
    model = BY_NAME["llama"].build()
    before = settled(model)
    with pytest.raises(error, match=r"nothing|width"):
        mplus.wrap(model, config_for(BY_NAME["llama"], **changes))
    assert state_of(model) == before


def test_frequencies_that_are_not_there_leave_the_decoder_alone() -> None:
    model = BY_NAME["gpt2"].build()
    before = settled(model)
    with pytest.raises(ConfigError, match="rope_inv_freq_dtype"):
        mplus.wrap(model, config_for(BY_NAME["gpt2"], rope_inv_freq_dtype="bfloat16"))
    assert state_of(model) == before


def test_a_decoder_that_fails_its_self_check_is_given_back_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    from mplus.hf.model.self_check import Check

    model = BY_NAME["llama"].build()
    before, attention = settled(model), model.config._attn_implementation
    monkeypatch.setattr(
        sys.modules["mplus.hf.model.wrapping"], "self_check", lambda *_: [Check("reading", 0.5, passed=False)]
    )
    with pytest.raises(NotSupported, match=r"cannot carry a memory: .*reading: relative error 0\.5"):
        mplus.wrap(model, config_for(BY_NAME["llama"]))
    assert state_of(model) == before
    assert model.config._attn_implementation == attention


def test_state_dicts_go_between_wrapped_decoders() -> None:
    first, second = (retrofit(BY_NAME["llama"], seed=seed).wrapped for seed in (0, 1))
    assert second.load_state_dict(first.state_dict()) == nn.modules.module._IncompatibleKeys([], [])
    assert torch.equal(second(TEXT).logits, first(TEXT).logits)


def test_isinstance_and_name_stay() -> None:
    model = BY_NAME["llama"].build()
    cls, whole = type(model), model._no_split_modules
    mplus.wrap(model, config_for(BY_NAME["llama"]))
    assert isinstance(model, cls)
    assert isinstance(model, AutoModelForCausalLM._model_mapping[type(model.config)])
    assert (type(model).__name__, type(model).__qualname__, type(model).__module__) == (
        cls.__name__,
        cls.__qualname__,
        cls.__module__,
    )
    assert model._no_split_modules == whole
    assert type(model.model.layers[0]).__name__ == "LlamaDecoderLayer"
