"""Memory on decoders whose weights bitsandbytes keeps in 8 or 4 bits, against the same weights written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import mplus
from benchmarks.quality.architectures import oracle
from benchmarks.quality.architectures.decoders import Architecture
from benchmarks.quality.architectures.retrofitted import CHUNK, K, config_for
from tests.hf.references import error, ids, merged, stir

pytest.importorskip("bitsandbytes")

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA = Architecture("llama", "llama", {**SIZES, "num_hidden_layers": 3})
"""bitsandbytes takes weights in blocks of 64 values."""
TEXT, CHUNKS = ids(1, 9), ids(1, 6 * CHUNK, seed=1)[0]
QUANTISED = {
    "8 bit": BitsAndBytesConfig(load_in_8bit=True),
    "4 bit": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
    "4 bit twice": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True, bnb_4bit_quant_type="nf4"),
}
LAYERS = {"8 bit": "Linear8bitLt", "4 bit": "Linear4bit", "4 bit twice": "Linear4bit"}
OPTIONS = {"dtype": torch.float32, "attn_implementation": "eager"}
CLOSE = 0.1
"""Mean relative error allowed: with 8 bits, and on some CPUs with 4, the inputs of products are rounded as well."""


@pytest.fixture(params=list(QUANTISED))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def base(kind: str, tmp_path: Path) -> Any:
    return quantised(kind, tmp_path)


@torch.no_grad()
def quantised(kind: str, folder: Path) -> Any:
    """A new decoder."""
    LLAMA.build().save_pretrained(folder / "decoder")
    model = AutoModelForCausalLM.from_pretrained(folder / "decoder", quantization_config=QUANTISED[kind], **OPTIONS)
    # On some CPUs the first call packs 4-bit weights anew, and taking a state dict unpacks them: both round once more.
    model(TEXT)
    return model


@torch.no_grad()
def written_out(model: Any) -> Any:
    """A plain decoder with the values that the quantised weights stand for."""
    plain = LLAMA.build(attn_implementation="eager")
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear):
            source = model.get_submodule(name)
            if type(source).__name__ == "Linear8bitLt":
                scales = source.weight.SCB if source.weight.SCB is not None else source.state.SCB
                module.weight.copy_(source.weight.data.float() * scales[:, None] / 127)
            else:
                module.weight.copy_(source(torch.eye(module.in_features)).T)
    return plain


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).detach().abs().mean() / expected.detach().abs().mean())


def kinds(model: Any) -> set[str]:
    return {type(module).__name__ for module in model.modules() if isinstance(module, nn.Linear)}


def test_write_and_read_are_those_of_the_weights_written_out(base: Any, kind: str) -> None:
    assert LAYERS[kind] in kinds(base)
    plain, alone = written_out(base), base(TEXT).logits
    assert error(plain(TEXT).logits, LLAMA.build()(TEXT).logits) > 0.01  # rounding to few bits shows
    model = stir(mplus.wrap(base, config_for(LLAMA, long_term_tokens=0)))
    assert LAYERS[kind] in kinds(model)
    assert torch.equal(model(TEXT).logits, alone)
    memory = model.new_memory()
    memory.write(CHUNKS[:CHUNK])
    rows = [one.hidden for one in memory.states[0].stm]
    begin, mark = list(model.mplus.begin.detach()), model.mplus.mark.detach()[0, 0]
    writer, reader = (merged(plain, model, adapter) for adapter in ("write", "read"))
    expected = oracle.write(writer, CHUNKS[None, :CHUNK], begin, [row[:0] for row in begin], mark=mark, k=K)
    assert max(map(relative, rows, expected)) < CLOSE
    found = model(TEXT, memory=memory).logits
    prefix = [torch.cat([first, row]) for first, row in zip(begin, rows, strict=True)]
    assert relative(found, oracle.read(reader, TEXT, prefix)) < CLOSE
    assert relative(found, alone) > 3 * CLOSE


def test_generation_is_scored_as_a_forward_over_its_result(base: Any) -> None:
    model = stir(mplus.wrap(base, config_for(LLAMA, long_term_tokens=0)))
    memory = model.new_memory()
    memory.write(CHUNKS)
    options = {"memory": memory, "max_new_tokens": 5, "do_sample": False}
    output = model.generate(TEXT, **options, output_logits=True, return_dict_in_generate=True)
    again = model(output.sequences[:, :-1], memory=memory).logits[0, TEXT.shape[1] - 1 :]
    assert relative(torch.cat(output.logits), again) < CLOSE
    alone = model(output.sequences[:, :-1]).logits[0, TEXT.shape[1] - 1 :]
    assert relative(torch.cat(output.logits), alone) > 3 * CLOSE


def test_gradients_reach_both_adapters_and_only_them(base: Any) -> None:
    model = stir(mplus.wrap(base, config_for(LLAMA, long_term_tokens=0)))
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(".lora_" in name)
    engine = model.mplus_engine
    rows = engine.write(model.new_memory().snapshot(), TEXT).hidden
    sum(row.square().mean() for row in rows).backward()
    memory = model.new_memory()
    memory.write(CHUNKS[:CHUNK])
    model(TEXT, memory=memory, labels=TEXT).loss.backward()
    for adapter in ("write", "read"):
        found = [p.grad for n, p in model.named_parameters() if f".lora_B.{adapter}." in n]
        assert len(found) == 21
        assert all(grad is not None and grad.abs().max() > 0 for grad in found)
    assert not [n for n, p in model.named_parameters() if p.grad is not None and ".lora_" not in n]


def test_additions_come_back(base: Any, tmp_path: Path, kind: str) -> None:
    model = stir(mplus.wrap(base, config_for(LLAMA)))

    def remembering(one: Any) -> torch.Tensor:
        memory = one.new_memory()
        memory.write(CHUNKS)
        return one(TEXT, memory=memory).logits

    model.save_pretrained(tmp_path / "additions")
    saved = load_file(tmp_path / "additions" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    loaded = mplus.from_pretrained(tmp_path / "additions", quantization_config=QUANTISED[kind], **OPTIONS)
    assert LAYERS[kind] in kinds(loaded)
    assert relative(remembering(loaded), remembering(model)) < 1e-5


def test_a_quantised_base_is_saved_as_transformers_saves_it(base: Any, tmp_path: Path, kind: str) -> None:
    quantised(kind, tmp_path).save_pretrained(tmp_path / "reference")
    mplus.wrap(base, config_for(LLAMA)).save_pretrained(tmp_path / "saved", save_base=True)
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("saved/base", "reference"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    loaded = mplus.from_pretrained(tmp_path / "saved")
    assert LAYERS[kind] in kinds(loaded)


def test_unwrapping(base: Any) -> None:
    before, classes = base(TEXT).logits, {name: type(module) for name, module in base.named_modules()}
    mplus.unwrap(mplus.wrap(base, config_for(LLAMA)))
    assert torch.equal(base(TEXT).logits, before)
    assert {name: type(module) for name, module in base.named_modules()} == classes
