"""``transformers.Trainer`` on a wrapped decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

import mplus
from benchmarks.quality.architectures.decoders import BY_NAME
from benchmarks.quality.architectures.retrofitted import CHUNK, config_for, retrofit
from mplus.hf.adapters.lora import is_addition
from tests.hf.references import ids, stir, write_and_read

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

pytestmark = pytest.mark.two_computations

TEXTS = [{"input_ids": row, "labels": row} for row in ids(12, 9, seed=4)]


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    options = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    return TrainingArguments(output_dir=str(folder), **{**options, **changes})


def weights(model: Any) -> dict[str, Tensor]:
    return {name.replace(".base_layer.", "."): p.detach().clone() for name, p in model.named_parameters()}


def changed(model: Any, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}


class MemoryTrainer(Trainer):
    """Each text is written and then read, in one graph."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> Any:
        rows = inputs["input_ids"]
        return torch.stack([write_and_read(model, [row[None, :5]], row[None, 5:]) for row in rows]).mean()


def frozen(**changes: Any) -> Any:
    """A wrapped decoder of which only what mplus added is to be trained."""
    model = stir(retrofit(BY_NAME["llama"], long_term_tokens=0, **changes).wrapped)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_addition(name))
    return model


def test_without_memory_training_is_that_of_the_decoder(tmp_path: Path) -> None:
    base = BY_NAME["llama"].build()
    Trainer(base, arguments(tmp_path), train_dataset=TEXTS).train()
    model = retrofit(BY_NAME["llama"]).wrapped
    before = weights(model)
    Trainer(model, arguments(tmp_path), train_dataset=TEXTS).train()
    expected = weights(base)
    for name, tensor in weights(model).items():
        assert torch.equal(tensor, before[name] if is_addition(name) else expected[name]), name
    assert "model.embed_tokens.weight" in changed(model, before)


def test_evaluation_without_memory_is_that_of_the_decoder(tmp_path: Path) -> None:
    losses = [
        Trainer(model, arguments(tmp_path), eval_dataset=TEXTS).evaluate()["eval_loss"]
        for model in (BY_NAME["llama"].build(), retrofit(BY_NAME["llama"]).wrapped)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "gradient checkpointing"])
def test_with_a_frozen_base_only_additions_are_trained(checkpointing: bool, tmp_path: Path) -> None:
    model = frozen()
    before = weights(model)
    MemoryTrainer(model, arguments(tmp_path, gradient_checkpointing=checkpointing), train_dataset=TEXTS).train()
    found = changed(model, before)
    assert found == {name for name in before if is_addition(name)}
    assert {".write.", ".read."} <= {f".{name.split('.')[-2]}." for name in found if ".lora_" in name}


def test_gradient_checkpointing_trains_the_same(tmp_path: Path) -> None:
    trained = []
    for checkpointing in (False, True):
        model = frozen()
        MemoryTrainer(model, arguments(tmp_path, gradient_checkpointing=checkpointing), train_dataset=TEXTS).train()
        trained.append(weights(model))
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def test_resuming_equals_going_on(tmp_path: Path) -> None:
    whole = frozen()
    MemoryTrainer(whole, arguments(tmp_path / "whole"), train_dataset=TEXTS).train()
    options = {"save_strategy": "steps", "save_steps": 2}
    MemoryTrainer(frozen(), arguments(tmp_path / "parts", **options), train_dataset=TEXTS).train()
    checkpoint = tmp_path / "parts" / "checkpoint-2"
    assert all(map(is_addition, load_file(checkpoint / "model.safetensors")))
    assert not (checkpoint / "base").exists()
    second = stir(frozen(), seed=9)
    MemoryTrainer(second, arguments(tmp_path / "parts", **options), train_dataset=TEXTS).train(
        resume_from_checkpoint=str(checkpoint)
    )
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(second)[name], tensor), name


def test_a_checkpoint_is_a_saved_model(tmp_path: Path) -> None:
    model = frozen()
    trainer = MemoryTrainer(model, arguments(tmp_path), train_dataset=TEXTS)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = mplus.from_pretrained(tmp_path / "saved", base=BY_NAME["llama"].build())
    text, chunk = ids(1, 7), ids(1, CHUNK, seed=1)
    found, expected = (write_and_read(one, [chunk], text).item() for one in (loaded, model))
    assert found == pytest.approx(expected, abs=1e-5)


def test_a_state_dict_handed_over_by_the_trainer_is_what_gets_saved(tmp_path: Path) -> None:
    """As under FSDP, where only a gathered state dict is whole."""
    model = frozen()
    trainer = MemoryTrainer(model, arguments(tmp_path), train_dataset=TEXTS)
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    trainer._save(str(tmp_path / "saved"), state_dict=state)
    for name, tensor in load_file(tmp_path / "saved" / "model.safetensors").items():
        assert torch.equal(tensor, state[name])


def test_memory_is_a_column_and_can_be_part_of_a_batch(tmp_path: Path) -> None:
    model = frozen()
    memory = model.new_memory(2)
    memory.write(ids(2, CHUNK, seed=1))

    def collate(examples: list[dict[str, Tensor]]) -> dict[str, Any]:
        return {key: torch.stack([one[key] for one in examples]) for key in examples[0]} | {"memory": memory}

    trainer = Trainer(model, arguments(tmp_path, max_steps=1), train_dataset=TEXTS[:2], data_collator=collate)
    trainer._set_signature_columns_if_needed()
    assert {"input_ids", "labels", "memory"} <= set(trainer._signature_columns)
    text = torch.stack([one["input_ids"] for one in TEXTS[:2]])
    with torch.no_grad():
        expected = float(model(text, labels=text, memory=memory).loss)
    before = weights(model)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-4)
    adapters = {name.split(".")[-2] for name in changed(model, before) if ".lora_" in name}
    assert adapters == {"read"}, "a memory written before has no graph of its writes"


def test_dropout_in_the_decoder_and_in_the_adapters(tmp_path: Path) -> None:
    base = BY_NAME["llama"].build()
    base.config.attention_dropout = 0.2
    for layer in base.model.layers:
        layer.self_attn.attention_dropout = 0.2
    model = mplus.wrap(
        base.train(), config_for(BY_NAME["llama"], adapters={"rank": 2, "dropout": 0.2}, long_term_tokens=0)
    )
    stir(model)
    losses = [write_and_read(model, [ids(1, CHUNK)], ids(1, 7)).item() for _ in range(2)]
    assert losses[0] != losses[1]
    MemoryTrainer(model, arguments(tmp_path), train_dataset=TEXTS).train()
    model.eval()
    losses = [write_and_read(model, [ids(1, CHUNK)], ids(1, 7)).item() for _ in range(2)]
    assert losses[0] == losses[1]
