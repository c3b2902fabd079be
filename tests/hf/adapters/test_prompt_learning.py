"""Prompt learning of PEFT around a wrapped decoder: virtual tokens as keys and values, or as embeddings."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from transformers import DynamicCache

import mplus
from mplus.errors import MemoryMismatchError
from mplus.hf.pretrained.shipped import load_decoder, load_tokenizer
from mplus.hf.reading.generating import generating
from tests.hf.adapters.test_peft_on_top import SIZES, STORY
from tests.hf.references import TOLERANCE, error

if TYPE_CHECKING:
    from collections.abc import Iterator

VIRTUAL = 5
COMMON: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": VIRTUAL}
KINDS: dict[str, peft.PeftConfig] = {
    "prefix": peft.PrefixTuningConfig(**COMMON),
    "prompt": peft.PromptTuningConfig(**COMMON),
    "p-tuning": peft.PromptEncoderConfig(encoder_hidden_size=16, **COMMON),
    "multitask": peft.MultitaskPromptTuningConfig(num_tasks=2, **COMMON),
}
TOKENIZER = load_tokenizer()
TOKENIZER.pad_token, TOKENIZER.padding_side = TOKENIZER.eos_token, "left"
PROMPT = TOKENIZER("One day, Lily went", return_tensors="pt")


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def learned(kind: str, wrapped_first: bool = False) -> Any:
    """A PeftModel around a wrapped decoder, with virtual tokens that matter."""
    base, config = load_decoder(), mplus.MPlusConfig.from_dict(SIZES)
    if wrapped_first:
        outer = mplus.wrap(peft.get_peft_model(mplus.wrap(base, config, check=False), copy.deepcopy(KINDS[kind])))
    else:
        outer = mplus.wrap(peft.get_peft_model(base, copy.deepcopy(KINDS[kind])), config, check=False)
    generator = torch.Generator().manual_seed(7)
    for parameter in outer.prompt_encoder.parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return outer.eval()


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    with torch.no_grad():
        return {kind: learned(kind) for kind in KINDS}


def told(model: Any) -> Any:
    memory = model.new_memory(tokenizer=TOKENIZER)
    memory.write(STORY)
    return memory


def arguments(kind: str, prompts: Any = PROMPT) -> dict[str, Any]:
    rows = prompts["input_ids"].shape[0]
    return {**prompts, **({"task_ids": torch.ones(rows, dtype=torch.int64)} if kind == "multitask" else {})}


def generated(model: Any, memory: Any, **inputs: Any) -> torch.Tensor:
    options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return torch.stack(model.generate(**inputs, memory=memory, **options).logits, 1)


@pytest.mark.parametrize("kind", list(KINDS))
def test_forward_gives_what_generate_gives(kind: str, models: dict[str, Any]) -> None:
    model = models[kind]
    memory = told(model)
    found = model(**arguments(kind), memory=memory).logits[:, -1]
    assert error(found, generated(model, memory, **arguments(kind))[:, 0]) < TOLERANCE
    assert error(found, model(**arguments(kind)).logits[:, -1]) > 0.1
    assert error(found, model.get_base_model()(**PROMPT, memory=memory).logits[:, -1]) > 0.1


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_padded_row_gives_what_it_gives_alone(kind: str, models: dict[str, Any]) -> None:
    model = models[kind]
    memory = told(model)
    both = TOKENIZER(["One day, Lily went", "Tom"], padding=True, return_tensors="pt")
    found = model(**arguments(kind, both), memory=memory.select([0, 0])).logits[:, -1]
    for row, text in enumerate(["One day, Lily went", "Tom"]):
        alone = model(**arguments(kind, TOKENIZER(text, return_tensors="pt")), memory=memory).logits[0, -1]
        assert error(found[row], alone) < TOLERANCE


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_second_forward_goes_on_from_the_cache(kind: str, models: dict[str, Any]) -> None:
    model = models[kind]
    memory = told(model)
    first = model(**arguments(kind), memory=memory, use_cache=True)
    tokens = torch.tensor([[5, 9, 33]])
    mask = torch.cat([PROMPT["attention_mask"], torch.ones_like(tokens)], 1)
    second = model(input_ids=tokens, attention_mask=mask, past_key_values=first.past_key_values, memory=memory)
    # One text, which retrieves with its first part only, as the two forwards do.
    reading = first.past_key_values._mplus_reading
    whole = {"input_ids": torch.cat([PROMPT["input_ids"], tokens], 1), "attention_mask": mask}
    with generating(model.get_base_model(), reading):
        expected = model(**arguments(kind, whole)).logits[:, -3:]
    assert error(second.logits, expected) < TOLERANCE


@pytest.mark.parametrize("kind", list(KINDS))
def test_loss_and_gradients_reach_the_virtual_tokens_only(kind: str) -> None:
    model = learned(kind)
    memory = told(model)
    (ids,) = PROMPT["input_ids"]
    logits = model(**arguments(kind), memory=memory).logits[0, :-1]
    # Virtual tokens that are embeddings have a next token to guess as well: the last one the text's first.
    guessed = ids[1:] if kind == "prefix" else ids
    expected = torch.nn.functional.cross_entropy(logits[-len(guessed) :], guessed)
    with torch.enable_grad():
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("prompt_encoder" in name)
        loss = model(**arguments(kind), memory=memory, labels=PROMPT["input_ids"]).loss
        loss.backward()
    assert float(loss) == pytest.approx(float(expected), abs=1e-4)
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert all("prompt_encoder" in name for name in grads)
    assert max(grad.abs().max() for grad in grads.values()) > 1e-4


def test_caches_of_a_user_stay_checked(models: dict[str, Any]) -> None:
    model = models["prefix"]
    memory, decoder = told(model), model.get_base_model()
    alone = model(**PROMPT, use_cache=True).past_key_values  # the prefix and a text that was read without a memory
    with pytest.raises(MemoryMismatchError, match="without a memory"):
        decoder(torch.tensor([[5]]), past_key_values=alone, memory=memory)
    with pytest.raises(MemoryMismatchError, match="without a memory"):
        model(torch.tensor([[5]]), past_key_values=alone, memory=memory)
    read = model(**PROMPT, memory=memory, use_cache=True).past_key_values
    memory.write(STORY)
    with pytest.raises(MemoryMismatchError, match="version"):
        model(torch.tensor([[5]]), past_key_values=read, memory=memory)
    empty = DynamicCache(config=decoder.config)
    assert decoder(**PROMPT, past_key_values=empty, memory=memory).logits.isfinite().all()


def test_prefix_tuning_around_a_wrapped_decoder_is_passed_to_wrap() -> None:
    config = mplus.MPlusConfig.from_dict(SIZES)
    outer = peft.get_peft_model(mplus.wrap(load_decoder(), config, check=False), copy.deepcopy(KINDS["prefix"])).eval()
    memory = told(outer)
    with pytest.raises(MemoryMismatchError, match=r"pass the PeftModel to mplus\.wrap"):
        outer(**PROMPT, memory=memory)
    assert mplus.wrap(outer) is outer
    assert mplus.wrap(outer) is outer
    found = outer(**PROMPT, memory=memory).logits[:, -1]
    assert error(found, generated(outer, memory, **PROMPT)[:, 0]) < TOLERANCE
