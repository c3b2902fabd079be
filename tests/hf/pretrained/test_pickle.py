"""Copies of a wrapped decoder, in this process and in another one."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch

import mplus
from benchmarks.quality.architectures.decoders import BY_NAME
from benchmarks.quality.architectures.retrofitted import CHUNK, config_for, retrofit
from mplus.errors import MemoryMismatchError
from mplus.hf.retrofit.context import MemoryLayer
from tests.hf.references import error, ids, stir

if TYPE_CHECKING:
    from collections.abc import Callable

TEXT, CHUNKS = ids(1, 9), ids(1, 6 * CHUNK, seed=1)[0]


def through_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def through_torch(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = [copy.deepcopy, through_pickle, through_torch]


@torch.no_grad()
def remembering(model: Any) -> torch.Tensor:
    """Logits behind a memory that reaches into the LTM."""
    memory = model.new_memory()
    memory.write(CHUNKS)
    return model(TEXT, memory=memory).logits


def model_of(name: str) -> Any:
    return stir(retrofit(BY_NAME[name]).wrapped)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon-new", "jamba"])
def test_a_copy_is_wrapped_and_stands_alone(name: str, way: Callable[[Any], Any]) -> None:
    model = model_of(name)
    expected, alone = remembering(model), model(TEXT).logits
    twin = way(model)
    assert type(twin) is type(model)
    assert twin.mplus_engine.model is twin
    assert twin.mplus is twin.mplus_engine.mechanism.additions
    modules = set(twin.modules())
    assert not modules & set(model.modules())
    for spec in twin.mplus_engine.retrofit.anatomy.specs:
        assert {spec.layer, spec.attention} <= modules
        assert isinstance(spec.layer, MemoryLayer)
        (hook,) = spec.attention._forward_pre_hooks.values()
        assert hook.spec is spec
        assert hook.retrofit is twin.mplus_engine.retrofit
    assert {parameter.data_ptr() for parameter in twin.parameters()}.isdisjoint(
        parameter.data_ptr() for parameter in model.parameters()
    )
    assert torch.equal(remembering(twin), expected)

    with torch.no_grad():  # neither notices what happens to the other
        for parameter in twin.parameters():
            parameter.mul_(1.1)
    assert torch.equal(remembering(model), expected)
    assert torch.equal(model(TEXT).logits, alone)
    assert error(remembering(twin), expected) > 0.01
    mplus.unwrap(model)
    remembering(twin)
    mplus.unwrap(twin)
    assert type(twin) is type(model) is type(BY_NAME[name].build())


def test_a_memory_stays_with_its_model() -> None:
    model = model_of("llama")
    memory = model.new_memory()
    memory.write(CHUNKS)
    twin = copy.deepcopy(model)
    with pytest.raises(MemoryMismatchError, match="another model"):
        twin(TEXT, memory=memory)


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_keeps_what_was_added_to_gradients(way: Callable[[Any], Any]) -> None:
    model = model_of("llama")
    model.model.embed_tokens.requires_grad_(False)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    twin = way(model)
    assert {name for name, parameter in twin.named_parameters() if parameter.requires_grad} == trainable


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_of_a_peft_model_around_a_wrapped_decoder(way: Callable[[Any], Any], tmp_path: Path) -> None:
    outer = stir(peft.get_peft_model(BY_NAME["llama"].build(), peft.LoraConfig(target_modules=["q_proj"])))
    mplus.wrap(outer, config_for(BY_NAME["llama"]))
    stir(outer)
    twin = way(outer)
    assert torch.equal(remembering(twin.get_base_model()), remembering(outer.get_base_model()))
    twin.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 10_000
    mplus.unwrap(twin)
    assert type(twin) is peft.PeftModelForCausalLM or type(twin).__name__ == "PeftModel"
