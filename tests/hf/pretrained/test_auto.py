"""``import mplus.hf`` teaches the Auto classes of transformers the model type "mplus"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    pipeline,
)

import mplus
from benchmarks.quality.architectures.decoders import BY_NAME, VOCAB_SIZE
from benchmarks.quality.architectures.retrofitted import CHUNK, config_for, retrofit
from mplus.errors import CheckpointError
from mplus.hf import MPlusModelConfig
from tests.hf.references import ids, stir

TEXT = ids(1, 9)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    model().save_pretrained(folder, save_base=True)
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(VOCAB_SIZE)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", padding_side="left").save_pretrained(folder)
    return folder


def model() -> Any:
    return stir(retrofit(BY_NAME["llama"]).wrapped)


def remembering(wrapped: Any) -> torch.Tensor:
    memory = wrapped.new_memory()
    memory.write(ids(1, 6 * CHUNK, seed=1)[0])
    with torch.no_grad():
        return wrapped(TEXT, memory=memory).logits


def test_auto_config(saved: Path) -> None:
    config = AutoConfig.from_pretrained(saved)
    assert isinstance(config, MPlusModelConfig)
    assert config.memory_config == config_for(BY_NAME["llama"])
    assert config.base_config["model_type"] == "llama"
    again = MPlusModelConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()


def test_auto_model(saved: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(saved)
    assert isinstance(loaded, LlamaForCausalLM)
    assert torch.equal(remembering(loaded), remembering(model()))


def test_auto_model_takes_the_options_of_the_decoder(saved: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(
        saved, dtype=torch.bfloat16, attn_implementation="eager", device_map="cpu", local_files_only=True
    )
    assert loaded.mplus_installed.base_attention == "eager"
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert loaded(TEXT, output_attentions=True).attentions[0].shape == (1, 4, 9, 9)


def test_auto_model_takes_a_changed_config(saved: Path) -> None:
    config = AutoConfig.from_pretrained(saved)
    config.mplus["store"] = {"name": "nowhere"}
    with pytest.raises(LookupError, match="nowhere"):
        AutoModelForCausalLM.from_pretrained(saved, config=config)
    config.mplus["store"] = "ram"
    config.mplus["chunk_tokens"] = 7
    assert AutoModelForCausalLM.from_pretrained(saved, config=config).mplus_config.chunk_tokens == 7


def test_from_config_makes_a_new_wrapped_decoder(saved: Path) -> None:
    config = AutoConfig.from_pretrained(saved)
    made = AutoModelForCausalLM.from_config(config)
    assert made.mplus_config == config.memory_config
    assert {name: tuple(p.shape) for name, p in made.state_dict().items()} == {
        name: tuple(p.shape) for name, p in model().state_dict().items()
    }
    memory = made.new_memory()
    memory.write(TEXT)
    made(TEXT, memory=memory)
    assert AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).mplus.begin.dtype == torch.bfloat16


def test_from_config_needs_the_decoders_own() -> None:
    with pytest.raises(CheckpointError, match="base_config"):
        AutoModelForCausalLM.from_config(MPlusModelConfig(mplus={}))


def test_pipeline_from_a_folder(saved: Path) -> None:
    generator = pipeline("text-generation", model=str(saved), tokenizer=str(saved), device="cpu")
    memory = generator.model.new_memory(tokenizer=generator.tokenizer)
    memory.write(" ".join(f"w{number}" for number in ids(1, 6 * CHUNK, seed=1)[0].tolist()))
    prompt = " ".join(f"w{number}" for number in TEXT[0].tolist())
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
    [found] = generator(prompt, memory=memory, **options)
    expected = generator.model.generate(TEXT, memory=memory, max_new_tokens=5, do_sample=False)[0, TEXT.shape[1] :]
    assert found["generated_text"] == generator.tokenizer.decode(expected, skip_special_tokens=True)
    [alone] = generator(prompt, **options)
    assert alone["generated_text"] != found["generated_text"]
    [[first], [second]] = generator([prompt, "w7 w9"], memory=memory, **options)  # one prompt after the other
    assert first == found
    expected = generator.model.generate(torch.tensor([[7, 9]]), memory=memory, max_new_tokens=5, do_sample=False)[0, 2:]
    assert second["generated_text"] == generator.tokenizer.decode(expected, skip_special_tokens=True)


def test_tokenizer_next_to_the_model(saved: Path) -> None:
    assert AutoTokenizer.from_pretrained(saved)("w7 w9")["input_ids"] == [7, 9]


def test_registering_twice_is_harmless() -> None:
    mplus.hf.register_auto_classes()
