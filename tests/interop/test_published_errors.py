"""Checkpoints in the published layout that lack something or contradict themselves: what is wrong is named."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mplus.errors import CheckpointError
from mplus.interop import PublishedCheckpoint, load_published
from mplus.interop.tensors import INDEX, WEIGHTS
from tests.references.published_layout import LAYERS, config, state_dict, write_folder

NEEDED = {
    "mplus": [
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps",
        "rope_theta", "num_tokens", "num_blocks", "num_ltm_blocks", "update_ltm_mode", "update_ltm_frequency",
        "initial_rf_when_moving_stm_to_ltm", "decay_frequency", "add_bos_embedding", "add_decoder_lora",
        "drop_memory_per_layer", "lora_config", "selector_hidden_dim", "num_selector_layers",
    ],
    "memoryllm": [
        "num_tokens", "num_blocks", "add_bos_embedding", "add_decoder_lora", "drop_memory_per_layer", "lora_config",
    ],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind, keys in NEEDED.items() for key in keys])
def test_missing_key(kind, key, tmp_path):
    plain = config(kind)
    folder = write_folder(tmp_path, {k: v for k, v in plain.items() if k != key}, state_dict(plain))
    # Without its number of long-term blocks a checkpoint looks like one without long-term memory.
    expected = (
        "memory must have shape|num_memory_tokens" if key == "num_ltm_blocks" else f"{key} must be .* which is missing"
    )
    with pytest.raises(CheckpointError, match=expected):
        PublishedCheckpoint.open(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, 'model_type must be "llama", got \'mistral\''),
        ({"num_tokens": 0}, "num_tokens must be a whole number of at least 1, got 0"),
        ({"num_blocks": 2}, r"num_blocks must be more than num_ltm_blocks \(2\), got 2"),
        ({"num_memory_tokens": 7}, "num_memory_tokens must be 24, got 7"),
        ({"add_bos_embedding": False}, "add_bos_embedding must be true, got False"),
        ({"add_decoder_lora": "yes"}, "add_decoder_lora must be true or false, got 'yes'"),
        ({"update_ltm_mode": "decouple"}, 'update_ltm_mode must be "immediate", got \'decouple\''),
        ({"map_from_hidden_states": False}, "map_from_hidden_states must be true, got False"),
        ({"num_selector_layers": 3}, "num_selector_layers must be 1 or 2, got 3"),
        ({"decay_frequency": -1}, "decay_frequency must be a number of at least 0, got -1"),
        ({"hidden_size": 48}, r"must have shape \[97, 48\] by config.json, got \[97, 32\]"),
        ({"num_hidden_layers": 2}, r"bos_embedding must have shape \[2, 1, 32\]"),
        ({"selector_hidden_dim": 4}, r"query_proj.0.weight must have shape \[8, 32\] by config.json, got \[16, 32\]"),
        ({"num_selector_layers": 1}, r"must have model.layers.0.self_attn.query_proj.weight of shape \[8, 32\]"),
        ({"ltm_initial_size": 19}, r"ltm.0 must have shape \[19, 32\] by config.json, got \[20, 32\]"),
        ({"num_blocks": 7, "num_memory_tokens": 28}, r"memory must have shape \[3, 20, 32\] .*, got \[3, 16, 32\]"),
        ({"add_decoder_lora": False}, "must not have a tensor .*decoder_adapter"),
        ({"rope_scaling": {"rope_type": "unheard of"}}, "must describe a Llama that transformers can build"),
    ],
    ids=str,
)  # fmt: skip
def test_contradictory_key(change, message, tmp_path):
    plain = config("mplus")
    folder = write_folder(tmp_path, {**plain, **change}, state_dict(plain))
    with pytest.raises(CheckpointError, match=message):
        PublishedCheckpoint.open(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 0}, "lora_config.r must be a whole number of at least 1, got 0"),
        ({"r": 3}, r"lora_A.default.weight must have shape \[3, 32\]"),
        ({"lora_alpha": None}, "lora_config.lora_alpha must be a number"),
        ({"lora_dropout": 1}, "lora_config.lora_dropout must be below 1, got 1"),
        ({"use_rslora": True}, "lora_config.use_rslora must be off"),
        ({"target_modules": "all-linear"}, "lora_config.target_modules must be a list of names"),
        (
            {"target_modules": ["q_proj"]},
            r"must have model.layers.0.self_attn.k_proj.weight .*but there is .*base_layer",
        ),
    ],
    ids=str,
)
def test_contradictory_adapters(change, message, tmp_path):
    plain = config("mplus")
    folder = write_folder(tmp_path, {**plain, "lora_config": {**plain["lora_config"], **change}}, state_dict(plain))
    with pytest.raises(CheckpointError, match=message):
        PublishedCheckpoint.open(folder)


@pytest.mark.parametrize(
    "name",
    [
        "memory", "bos_embedding", "new_memory_positional_emb", "ltm.1", "ltm_keys.2", "ltm_ages.0",
        "ltm_recall_frequencies.1", "lm_head.weight", "model.norm.weight",
        "model.layers.1.self_attn.q_proj.base_layer.weight",
        "model.layers.2.mlp.up_proj.lora_A.decoder_adapter.weight", "model.layers.0.self_attn.key_proj.2.weight",
    ],
)  # fmt: skip
def test_missing_wrong_and_unknown_tensor(name, tmp_path):
    plain = config("mplus")
    tensors = state_dict(plain)
    kept = tensors.pop(name)
    with pytest.raises(CheckpointError, match=f"must have {name} of shape .* which is missing"):
        PublishedCheckpoint.open(write_folder(tmp_path / "missing", plain, tensors))
    longer = torch.cat([kept, kept[-1:]], 0) if kept.dim() else kept
    with pytest.raises(CheckpointError, match=f"{name} must have"):
        PublishedCheckpoint.open(write_folder(tmp_path / "longer", plain, {**tensors, name: longer}))
    with pytest.raises(CheckpointError, match=f"{name} must be stored as floating-point numbers"):
        PublishedCheckpoint.open(write_folder(tmp_path / "whole", plain, {**tensors, name: kept.to(torch.int8)}))
    with pytest.raises(CheckpointError, match=f"must not have a tensor {name}.more"):
        PublishedCheckpoint.open(
            write_folder(tmp_path / "more", plain, {**tensors, name: kept, f"{name}.more": kept + 0})
        )


def test_long_term_columns_must_agree_where_the_config_is_silent(tmp_path):
    plain = config("mplus")
    tensors = state_dict(plain)
    del plain["ltm_initial_size"]
    assert PublishedCheckpoint.open(write_folder(tmp_path / "good", plain, tensors)).long_term_rows == (20,) * LAYERS
    tensors["ltm_keys.1"] = tensors["ltm_keys.1"][:-1].clone()
    with pytest.raises(CheckpointError, match=r"ltm_keys.1 must have as many rows as ltm.1 \(20\), got 19"):
        PublishedCheckpoint.open(write_folder(tmp_path / "bad", plain, tensors))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ltm_ages.2", -1.0, "ltm_ages.2 must hold numbers of at least 0, got -1.0"),
        ("ltm_ages.0", float("nan"), "ltm_ages.0 must hold numbers of at least 0, got nan"),
        ("ltm_recall_frequencies.1", float("inf"), "ltm_recall_frequencies.1 must hold finite numbers, got inf"),
    ],
)
def test_impossible_ages_and_frequencies(name, value, message, tmp_path):
    plain = config("mplus")
    tensors = state_dict(plain)
    tensors[name][3] = value
    with pytest.raises(CheckpointError, match=message):
        load_published(write_folder(tmp_path, plain, tensors))


@pytest.mark.parametrize(("kind", "value", "message"), [("memoryllm", 2, "0 or 1, got 2"), ("mplus", 0, "1, got 0")])
def test_impossible_initialized(kind, value, message, tmp_path):
    plain = config(kind)
    tensors = {**state_dict(plain), "initialized": torch.tensor(value, dtype=torch.uint8)}
    with pytest.raises(CheckpointError, match=f"initialized must be {message}"):
        PublishedCheckpoint.open(write_folder(tmp_path, plain, tensors))


def test_what_is_left_of_training_does_no_harm(tmp_path):
    plain = config("mplus")
    tensors = {**state_dict(plain), "initialized": torch.ones((), dtype=torch.uint8)}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    assert len(PublishedCheckpoint.open(write_folder(tmp_path, plain, tensors)).ignored) == 2 * LAYERS + 1


def test_damaged_files(tmp_path):
    plain = config("mplus")
    tensors = state_dict(plain)

    def refused(folder, message):
        with pytest.raises(CheckpointError, match=message):
            PublishedCheckpoint.open(folder)

    refused(tmp_path / "nowhere", "config.json must exist")
    folder = write_folder(tmp_path / "cut", plain, tensors)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])
    refused(folder, "model.safetensors must be a complete safetensors file")
    (folder / WEIGHTS).unlink()
    refused(folder, "must hold its weights as model.safetensors or as shards")
    (folder / "config.json").write_text("{")
    refused(folder, "config.json must be valid JSON")

    folder = write_folder(tmp_path / "shards", plain, tensors, shards=3)
    shard = folder / "model-00002-of-00003.safetensors"
    part = load_file(shard)
    moved = next(iter(part))
    save_file({name: tensor for name, tensor in part.items() if name != moved}, shard)
    refused(folder, f"model-00002-of-00003.safetensors must hold {moved} according to {INDEX}")
    shard.unlink()
    refused(folder, f"model-00002-of-00003.safetensors must exist: {INDEX} names it")
    save_file({**part, "memory": tensors["memory"], "ltm.0": tensors["ltm.0"]}, shard)
    refused(folder, "model-00002-of-00003.safetensors holds .*, which .* must place there, but it says")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"memory": "../elsewhere.safetensors"}}))
    refused(folder, "must give a file name in the same folder")
    (folder / INDEX).write_text("{}")
    refused(folder, "must be JSON with a weight_map")
