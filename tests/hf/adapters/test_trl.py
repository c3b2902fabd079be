"""TRL's trainers on a wrapped decoder in bfloat16: only the new adapter moves, and checkpoints go on."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
import trl
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import mplus
from mplus.hf.adapters.lora import is_addition
from mplus.hf.pretrained.shipped import load_tokenizer
from tests.hf.adapters.test_peft_on_top import SIZES, STORY

if TYPE_CHECKING:
    from pathlib import Path

TOKENIZER = load_tokenizer()
TOKENIZER.pad_token = TOKENIZER.eos_token
OPTIONS: dict[str, Any] = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.01,
    "use_cpu": True,
    "bf16": False,  # the decoder is, nothing is cast
    "gradient_checkpointing": False,
    "report_to": [],
    "save_strategy": "steps",
    "save_steps": 1,
    "disable_tqdm": True,
}


def wrapped() -> Any:
    decoder = str(files("mplus") / "data" / "stories260K")
    base = AutoModelForCausalLM.from_pretrained(decoder, dtype=torch.bfloat16)
    return mplus.wrap(base, mplus.MPlusConfig.from_dict(SIZES), check=False)


def lora() -> peft.LoraConfig:
    return peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def tuner(model: Any, folder: Path, **more: Any) -> Any:
    texts = Dataset.from_dict({"text": [STORY[:200], "Tom has a small blue boat. " * 3] * 4})
    arguments = trl.SFTConfig(output_dir=str(folder), max_length=64, **OPTIONS)
    return trl.SFTTrainer(model=model, args=arguments, train_dataset=texts, processing_class=TOKENIZER, **more)


def values(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def moved(model: Any, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


def test_supervised_fine_tuning_moves_the_new_adapter_alone_and_goes_on(tmp_path: Path) -> None:
    trainer = tuner(wrapped(), tmp_path / "run", peft_config=lora())
    before = values(trainer.model)
    trainer.train()
    assert moved(trainer.model, before) == {name for name in before if ".default." in name}

    trainer.save_model(str(tmp_path / "saved"))
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert len(saved) == 20  # 5 layers, q and v, A and B
    decoder = trainer.model.get_base_model()
    decoder.save_pretrained(tmp_path / "wrapped", save_base=True)
    again = peft.PeftModel.from_pretrained(mplus.from_pretrained(tmp_path / "wrapped", check=False), tmp_path / "saved")
    prompt, said = TOKENIZER("One day, Lily", return_tensors="pt"), []
    for model in (trainer.model.eval(), again.eval()):
        memory = model.new_memory(tokenizer=TOKENIZER)
        memory.write(STORY)
        with torch.no_grad():
            said.append(model(**prompt, memory=memory).logits)
    assert torch.equal(*said)

    second = tuner(wrapped(), tmp_path / "run", peft_config=lora())
    second.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    whole = values(trainer.model)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in values(second.model).items() if "default" in name)


def test_a_wrapped_peft_model_trains_what_it_would_train_anyway(tmp_path: Path) -> None:
    decoder = str(files("mplus") / "data" / "stories260K")
    outer = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(decoder, dtype=torch.bfloat16), lora())
    mplus.wrap(outer, mplus.MPlusConfig.from_dict(SIZES), check=False)
    trainer = tuner(outer, tmp_path)
    before = values(trainer.model)
    trainer.train()
    assert moved(trainer.model, before) == {name for name in before if ".default." in name}
    trainer.save_model(str(tmp_path / "saved"))
    loaded = mplus.from_pretrained(tmp_path / "saved", check=False)
    for name, tensor in values(loaded).items():
        if ".default." in name or is_addition(name.removeprefix("base_model.model.")):
            assert torch.equal(tensor, dict(trainer.model.named_parameters())[name]), name


def test_preference_tuning_takes_the_decoder_with_memory_as_its_reference(tmp_path: Path) -> None:
    """Without a reference of its own, TRL disables the new adapter for it, and enables it again."""
    pairs = {"prompt": ["One day, "] * 4, "chosen": ["Lily found a stone."] * 4, "rejected": ["xx"] * 4}
    arguments = trl.DPOConfig(output_dir=str(tmp_path), **{**OPTIONS, "max_steps": 1, "save_strategy": "no"})
    trainer = trl.DPOTrainer(
        model=wrapped(),
        args=arguments,
        train_dataset=Dataset.from_dict(pairs),
        processing_class=TOKENIZER,
        peft_config=lora(),
    )
    assert trainer.ref_model is None
    before = values(trainer.model)
    trainer.train()
    # One factor starts as zero, so that the other has no gradient in the first step.
    assert moved(trainer.model, before) == {name for name in before if ".lora_B.default." in name}
    assert {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad} == {
        name for name in before if ".default." in name
    }
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(0.6931, abs=1e-3)  # log 2: both say the same
