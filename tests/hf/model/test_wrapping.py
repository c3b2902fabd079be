"""What ``wrap`` takes, what it finds out about decoders of odd build, and how it says no."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, LlamaForCausalLM

import mplus
from benchmarks.quality.architectures.decoders import BY_NAME, VOCAB_SIZE
from benchmarks.quality.architectures.retrofitted import SIZES
from mplus.backends.choose import BackendChooser
from mplus.errors import CheckpointError, NotSupported
from mplus.hf.model.self_check import Check
from mplus.hf.model.shape import begin_inputs, decoder_shape
from mplus.hf.model.wrapping import _refusal
from mplus.hf.retrofit.discovery import discover
from mplus.hf.retrofit.hooks import Retrofit
from mplus.hf.retrofit.positions import MemoryPositions
from tests.hf.references import error, ids

TINY: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "out_hidden_size": 32,
    "deepstack_visual_indexes": [0],
}


def built(model_type: str, auto: Any = AutoModelForCausalLM, **options: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return auto.from_config(AutoConfig.for_model(model_type, **options)).eval()


def gemma4() -> Any:
    """The last two layers attend to keys and values of earlier ones."""
    return built(
        "gemma4_text",
        **TINY,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=64,
        head_dim=8,
        global_head_dim=16,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCAB_SIZE,
    )


def qwen3_vl() -> Any:
    """Its text configuration has no ``bos_token_id``."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    text = {**TINY, "num_hidden_layers": 2, "head_dim": 8, "rope_parameters": rope}
    tokens = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    return built("qwen3_vl", AutoModelForImageTextToText, text_config=text, vision_config=VISION, **tokens)


def zamba2() -> Any:
    """Attention reads hidden states beside embeddings, twice as wide."""
    return built(
        "zamba2",
        **TINY,
        mamba_d_state=8,
        mamba_ngroups=1,
        n_mamba_heads=4,
        mamba_headdim=16,
        layers_block_type=["mamba", "hybrid"] * 2,
        num_mem_blocks=1,
    )


def reads_a_memory(model: Any) -> None:
    memory = model.new_memory()
    memory.write(ids(1, 60)[0])
    with torch.no_grad():
        assert error(model(ids(1, 9), memory=memory).logits, model(ids(1, 9)).logits) > 0.01


def test_layers_that_share_keys_leave_the_cache_view_unchecked() -> None:
    model = mplus.wrap(gemma4(), SIZES)
    (found,) = (check for check in model.mplus_installed.checks if "cache view" in check.name)
    assert found.passed
    assert not found.checked
    assert "not checked, the cache view" in str(found)
    assert str(found) in model.mplus_summary()
    assert model.mplus_engine.retrofit.technique == "attention"
    reads_a_memory(model)
    whole = mplus.wrap(BY_NAME["llama"].build(), SIZES)
    assert all(check.checked for check in whole.mplus_installed.checks)


def test_a_text_configuration_without_bos(tmp_path: Path) -> None:
    model = qwen3_vl()
    assert not hasattr(model.config.get_text_config(decoder=True), "bos_token_id")
    reads_a_memory(mplus.wrap(model, SIZES))
    model.save_pretrained(tmp_path, save_base=True)
    for load in (mplus.from_pretrained, AutoModelForCausalLM.from_pretrained):
        loaded = load(tmp_path)
        assert type(loaded).__name__ == type(model).__name__ == "Qwen3VLForConditionalGeneration"
    reads_a_memory(loaded)


def test_the_begin_row_is_that_of_bos_else_of_eos_else_of_the_mean_embedding() -> None:
    model: Any = BY_NAME["llama"].build()
    embedding = model.get_input_embeddings().weight
    anatomy = discover(model)
    model.generation_config.bos_token_id = None
    for bos, eos, expected in ((3, 5, embedding[3]), (None, [5, 6], embedding[5]), (None, [], embedding.mean(0))):
        model.config.bos_token_id, model.config.eos_token_id = bos, eos
        first, *others = begin_inputs(model, anatomy)
        assert torch.allclose(first[0], expected, atol=1e-6)
        assert [rows.shape for rows in others] == [(1, 32)] * 2


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "opt-post-norm"])
def test_the_shape_of_a_decoder_is_that_of_what_it_computes(name: str) -> None:
    model: Any = BY_NAME[name].build()
    retrofit = Retrofit(discover(model), "attention", MemoryPositions(), BackendChooser("auto"))
    shape = decoder_shape(model, retrofit)
    wrapped = mplus.wrap(model, SIZES)
    engine = wrapped.mplus_engine
    kept, found = engine.need_projection(), engine.decoder.run(torch.tensor([[3, 4]]), collect={"inputs"})
    assert (shape.key_heads, shape.head_size, shape.value_size) == (kept.heads, kept.width, kept.value_width)
    assert (len(found.inputs), found.inputs[0].shape[2]) == (shape.layers, shape.width)
    assert engine.decoder.embed(torch.tensor([[3]])).shape[2] == shape.embedding_width
    assert shape.begin.shape == (shape.layers, 1, shape.width)
    assert shape.max_positions == model.config.max_position_embeddings
    for dtype in (torch.bfloat16, torch.float64):
        wrapped.to(dtype)
        assert engine.decoder.shape.dtype == engine.decoder.run(torch.tensor([[3]])).hidden.dtype == dtype


@pytest.mark.parametrize("rows", ["projected", "both"])
def test_the_config_says_how_rows_are_kept(rows: Any) -> None:
    model = mplus.wrap(BY_NAME["llama"].build(), {**SIZES, "memory_rows": rows})
    assert model.new_memory().stores[0].layout.keeps_hidden == (rows == "both")
    reads_a_memory(model)


@pytest.mark.parametrize(
    ("score", "width", "transposed"), [("mean_dot", 64, True), ("mean_dot", 63, False), ("sigmoid_mean", 64, False)]
)
def test_keys_lie_in_memory_as_the_retriever_reads_them(score: str, width: int, transposed: bool) -> None:
    retriever = {"name": "linear", "score": score, "width": width}
    model = mplus.wrap(BY_NAME["llama"].build(), {**SIZES, "retriever": retriever})
    assert model.new_memory().stores[0].layout.transposed_keys == transposed


def test_rows_that_cannot_be_kept_projected_are_refused_with_the_reason() -> None:
    model = BY_NAME["falcon-new"].build()
    with pytest.raises(NotSupported, match=r"memory_rows='projected' cannot be had .* computes attention by itself"):
        mplus.wrap(model, {**SIZES, "memory_rows": "projected"})
    assert not hasattr(model, "mplus_engine")


def test_what_attention_reads_is_wider_than_the_hidden_states() -> None:
    with pytest.raises(NotSupported, match="attends to states of width 64") as caught:
        mplus.wrap(zamba2(), SIZES)
    assert len(str(caught.value)) < 200


def test_a_decoder_that_fails_by_itself_is_refused_with_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    model = BY_NAME["llama"].build()

    def failing(*args: Any, **kwargs: Any) -> None:
        raise IndexError("no such expert")

    monkeypatch.setattr(model.model.layers[1].mlp, "forward", failing)
    with pytest.raises(NotSupported, match=r"cannot read four plain tokens .* IndexError: no such expert"):
        mplus.wrap(model, SIZES)


def test_a_refusal_says_each_cause_once() -> None:
    failed = [
        Check("memory acts", None, False, "RuntimeError: size 8 and 14"),
        Check("left-padded row = row alone", None, False, "RuntimeError: size 5 and 11"),
        Check("prefill and steps = full forward", 0.3, False),
        Check("prefill and steps = full forward", 0.31, False),
    ]
    details = [f"attention: {one}" for one in failed]
    refusal = _refusal("Odd", failed, details)
    assert str(refusal) == (
        "Odd cannot carry a memory: RuntimeError: size 8 and 14; prefill and steps = full forward: relative error 0.3"
    )
    assert refusal.details == tuple(details)
    many = [Check(f"check {number}", 1.0, False) for number in range(7)]
    assert "4 further reasons are in the error's details" in str(_refusal("Odd", many, []))


def test_a_base_that_was_moved_is_asked_for(tmp_path: Path) -> None:
    BY_NAME["llama"].build().save_pretrained(tmp_path / "decoder")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "decoder")
    mplus.wrap(base, SIZES).save_pretrained(tmp_path / "saved")
    (tmp_path / "decoder").rename(tmp_path / "elsewhere")
    for load in (mplus.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=r"cannot be loaded from '.*decoder'.* pass base="):
            load(tmp_path / "saved")
    assert isinstance(mplus.from_pretrained(tmp_path / "saved", base=tmp_path / "elsewhere"), LlamaForCausalLM)
    for file in ("README.md", "config.json"):
        assert "import mplus.hf" in (tmp_path / "saved" / file).read_text()
    assert "pass `base=`" in (tmp_path / "saved" / "README.md").read_text()
    mplus.from_pretrained(tmp_path / "saved", base=tmp_path / "elsewhere").save_pretrained(tmp_path / "again")
    assert "import mplus.hf" in (tmp_path / "again" / "config.json").read_text()
