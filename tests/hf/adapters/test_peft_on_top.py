"""Adapters that PEFT puts on a wrapped decoder: what trains, what is saved, and what it leaves alone."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import mplus
from mplus.errors import NotSupported
from mplus.hf.adapters.lora import is_addition
from mplus.hf.pretrained.shipped import load_decoder, load_tokenizer
from tests.hf.references import ids

if TYPE_CHECKING:
    from pathlib import Path

SIZES: dict[str, Any] = {
    "chunk_tokens": 32,
    "memory_tokens_per_chunk": 8,
    "short_term_tokens": 16,
    "retrieved_tokens": 8,
    "long_term_tokens": 500,
    "retriever": {"name": "linear", "width": 8},
    "adapters": {"rank": 2},
}
STORY = "Lily had a red ball. She gave it to Tom. " * 8
TASK = {"task_type": "CAUSAL_LM"}
QV = ["q_proj", "v_proj"]
KINDS: dict[str, peft.PeftConfig] = {
    "LoRA": peft.LoraConfig(r=4, target_modules=QV, **TASK),
    "DoRA": peft.LoraConfig(r=4, target_modules=QV, use_dora=True, **TASK),
    "biases": peft.LoraConfig(r=4, target_modules=QV, bias="all", **TASK),
    "all-linear": peft.LoraConfig(r=4, target_modules="all-linear", **TASK),
    "modules_to_save": peft.LoraConfig(r=4, target_modules=QV, modules_to_save=["norm"], **TASK),
    "IA3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **TASK),
    "VeRA": peft.VeraConfig(r=4, target_modules=["q_proj"], **TASK),
    "LoHa": peft.LoHaConfig(r=4, target_modules=QV, **TASK),
    "layer norms": peft.LNTuningConfig(target_modules=["input_layernorm"], **TASK),
    "prefix": peft.PrefixTuningConfig(num_virtual_tokens=4, **TASK),
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=4, **TASK),
    "p-tuning": peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=16, **TASK),
}


def wrapped(dtype: torch.dtype = torch.float32) -> Any:
    return mplus.wrap(load_decoder().to(dtype), mplus.MPlusConfig.from_dict(SIZES), check=False)


def trainable(model: Any) -> set[str]:
    """Names, as they are without adapters of ours."""
    return {name.replace(".base_layer", "") for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def moved(model: Any, seed: int = 3) -> Any:
    """Every tensor that trains gets values of its own."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


@pytest.mark.parametrize("kind", list(KINDS))
def test_only_the_new_adapter_trains(kind: str) -> None:
    expected = trainable(peft.get_peft_model(load_decoder(), copy.deepcopy(KINDS[kind])))
    outer = peft.get_peft_model(wrapped(), copy.deepcopy(KINDS[kind]))
    assert expected
    assert trainable(outer) == expected


def test_with_transformers_own_method_only_the_new_adapter_trains() -> None:
    plain, model = load_decoder(), wrapped()
    for one in (plain, model):
        one.add_adapter(copy.deepcopy(KINDS["LoRA"]))
    assert trainable(model) == trainable(plain)
    for one in (plain, model):
        one.add_adapter(copy.deepcopy(KINDS["LoRA"]), "second")
        one.set_adapter("second")
    assert trainable(model) == trainable(plain)
    for one in (plain, model):
        one.disable_adapters()
        one.enable_adapters()
        one.set_adapter("default")
        one.delete_adapter("second")
    assert trainable(model) == trainable(plain)
    assert model.active_adapters() == plain.active_adapters() == ["default"]
    assert model.get_adapter_state_dict().keys() == plain.get_adapter_state_dict().keys()


def test_preparing_for_quantised_training_freezes_everything_else(capsys: pytest.CaptureFixture[str]) -> None:
    model = peft.prepare_model_for_kbit_training(wrapped(torch.bfloat16), use_gradient_checkpointing=False)
    outer = peft.get_peft_model(model, copy.deepcopy(KINDS["LoRA"]))
    outer.print_trainable_parameters()
    count = sum(parameter.numel() for parameter in outer.parameters() if parameter.requires_grad)
    assert f"trainable params: {count:,d} ||" in capsys.readouterr().out
    assert all(".default." in name for name in trainable(outer))


def test_several_adapters_are_those_of_a_decoder_without_memory() -> None:
    plain, outer = (peft.get_peft_model(one, copy.deepcopy(KINDS["LoRA"])) for one in (load_decoder(), wrapped()))
    for one in (plain, outer):
        one.add_adapter("second", copy.deepcopy(KINDS["LoRA"]))
    for name in ("second", "default"):
        for one in (plain, outer):
            one.set_adapter(name)
        assert trainable(outer) == trainable(plain)
    for one in (plain, outer):
        with one.disable_adapter():
            pass
        one.delete_adapter("default")
    assert outer.active_adapter == plain.active_adapter == "second"
    assert trainable(outer) == trainable(plain)
    status, expected = outer.get_model_status(), plain.get_model_status()
    assert (status.available_adapters, status.active_adapters) == (
        expected.available_adapters,
        expected.active_adapters,
    )
    assert status.trainable_params == expected.trainable_params


@pytest.mark.parametrize("kind", ["LoRA", "all-linear", "IA3", "modules_to_save", "prefix"])
def test_a_new_adapter_is_saved_alone_and_comes_back(kind: str, tmp_path: Path) -> None:
    model, tokenizer = wrapped(), load_tokenizer()
    model.save_pretrained(tmp_path / "wrapped", save_base=True)
    outer = moved(peft.get_peft_model(model, copy.deepcopy(KINDS[kind]))).eval()
    outer.save_pretrained(tmp_path / "adapter")
    plain = peft.get_peft_model(load_decoder(), copy.deepcopy(KINDS[kind]))
    plain.save_pretrained(tmp_path / "reference")
    saved, reference = (
        load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("adapter", "reference")
    )
    assert saved.keys() == reference.keys()
    names = [{path.name for path in (tmp_path / folder).iterdir()} for folder in ("adapter", "reference")]
    assert names[0] == names[1]

    again = peft.PeftModel.from_pretrained(mplus.from_pretrained(tmp_path / "wrapped"), tmp_path / "adapter").eval()
    prompt, said = tokenizer("One day, Lily", return_tensors="pt"), []
    for one in (outer, again):
        memory = one.new_memory(tokenizer=tokenizer)
        memory.write(STORY)
        options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        said.append([torch.cat(one.generate(**prompt, **options, **more).logits) for more in ({"memory": memory}, {})])
    assert torch.equal(said[0][0], said[1][0])
    assert torch.equal(said[0][1], said[1][1])
    assert not torch.equal(said[0][0], said[0][1])


def test_additions_saved_below_a_users_adapter_have_the_names_they_have_without(tmp_path: Path) -> None:
    model = wrapped()
    model.save_pretrained(tmp_path / "before", save_base=True)
    peft.get_peft_model(model, copy.deepcopy(KINDS["LoRA"]))
    model.save_pretrained(tmp_path / "after", save_base=True)
    for file in ("model.safetensors", "base/model.safetensors"):
        before, after = (load_file(tmp_path / folder / file) for folder in ("before", "after"))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(map(is_addition, load_file(tmp_path / "after" / "model.safetensors")))
    text = ids(1, 7)
    assert torch.equal(mplus.from_pretrained(tmp_path / "after")(text).logits, load_decoder()(text).logits)


def test_what_could_not_be_told_apart_is_not_saved(tmp_path: Path) -> None:
    outer = peft.get_peft_model(wrapped(), copy.deepcopy(KINDS["LoRA"]))
    outer.merge_adapter()
    with pytest.raises(NotSupported, match="unmerge_adapter"):
        outer.get_base_model().save_pretrained(tmp_path / "saved", save_base=True)
    outer.unmerge_adapter()
    outer.add_adapter("write", copy.deepcopy(KINDS["LoRA"]))
    with pytest.raises(NotSupported, match="another name"):
        outer.get_base_model().save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
