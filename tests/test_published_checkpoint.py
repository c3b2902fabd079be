"""Loading checkpoints in the published layout, against a flat computation over their tensors."""

from __future__ import annotations

import json
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import mplus
from mplus.cli import app
from mplus.errors import CheckpointError, ConfigError
from mplus.interop import PublishedCheckpoint, load_published
from mplus.interop.tensors import INDEX, WEIGHTS, TensorFiles
from tests.published_layout import LAYERS, LTM_BLOCKS, POOL_BLOCKS, K, config, state_dict, write_folder
from tests.published_reference import PublishedReference

TEXT = torch.tensor([[5, 17, 3, 88, 41, 9, 60]])
SHORT = torch.tensor([[5, 17]])
CASES = {
    "mplus": {"kind": "mplus"},
    "mplus, one adapter": {"kind": "mplus", "decoder_lora": False},
    "mplus, one projector layer": {"kind": "mplus", "selector_layers": 1},
    "mplus, fewer long-term rows than a read": {"kind": "mplus", "ltm_rows": 5},
    "memoryllm": {"kind": "memoryllm"},
    "memoryllm, one adapter": {"kind": "memoryllm", "decoder_lora": False},
}


@pytest.fixture
def mplus_folder(tmp_path):
    plain = config("mplus")
    return write_folder(tmp_path / "published", plain, state_dict(plain))


@torch.no_grad()
def block(model, memory, ids):
    return torch.stack([rows[0] for rows in model.mplus_engine.encode(memory.states, ids)])


def worst(ours, reference):
    return float((ours.double() - reference).abs().max())


@pytest.mark.parametrize(("shards", "stored"), [(1, torch.float32), (3, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_reads_and_writes_what_the_tensors_say(name, shards, stored, tmp_path):
    plain = config(**CASES[name])
    tensors = state_dict(plain, stored)
    folder = write_folder(tmp_path, plain, tensors, shards)
    model, memory = load_published(folder, dtype=torch.float64, rope_inv_freq_dtype=None)
    reference = PublishedReference(plain, tensors)
    with torch.no_grad():
        assert worst(model(TEXT, memory=memory).logits[0], reference.read(TEXT[0])) < 2e-5
        assert float((model(TEXT, memory=memory).logits - model(TEXT).logits).abs().max()) > 1  # memory acts
    for ids in (TEXT, SHORT):  # longer and shorter than K
        assert worst(block(model, memory, ids), reference.write(ids[0])) < 2e-5


def test_the_memory_is_the_stored_one(mplus_folder):
    stored = load_file(mplus_folder / WEIGHTS)
    model, memory = load_published(mplus_folder)
    state, store = memory.states[0], memory.stores[0]
    assert (state.clock, memory.batch_size, model.training) == (0, 1, False)
    for layer in range(LAYERS):
        assert torch.equal(state.stm[layer].hidden, stored["memory"][layer])
        rows = store.gather(layer, store.ids(layer))
        assert torch.equal(rows.hidden, stored[f"ltm.{layer}"])
        assert torch.equal(rows.key, stored[f"ltm_keys.{layer}"])
        assert torch.equal(state.clock - 1 - rows.birth, stored[f"ltm_ages.{layer}"].long())
        assert torch.equal(rows.expiry, stored[f"ltm_recall_frequencies.{layer}"].double())
        # The stored keys are random, so recomputing them would show.
        assert not torch.allclose(model.mplus_engine.keys(layer, rows.hidden), rows.key, atol=0.1)


def test_config_of_an_mplus_checkpoint(mplus_folder):
    made = load_published(mplus_folder, config={"chunk_tokens": 64, "backend": "reference"})[0].mplus_config
    assert (made.variant, made.mechanism.name, made.long_term_tokens) == ("published", "mplus", None)
    assert made.mechanism.options == {"merge_every": 3, "lifetime": 10.0, "decay": 1.0}
    assert (made.memory_tokens_per_chunk, made.short_term_tokens, made.retrieved_tokens) == (K, POOL_BLOCKS * K, LTM_BLOCKS * K)
    assert made.retriever.options == {"width": 8, "layers": 2}
    assert (made.adapters.rank, made.adapters.alpha, made.adapters.dropout, made.adapters.shared) == (2, 8.0, 0.1, False)
    assert (made.rope_inv_freq_dtype, made.chunk_tokens, made.backend) == ("bfloat16", 64, "reference")


def test_fields_that_the_checkpoint_decides_cannot_be_set(mplus_folder):
    with pytest.raises(ConfigError, match="'short_term_tokens' is decided by the checkpoint"):
        load_published(mplus_folder, config={"short_term_tokens": 8})


def test_tensors_that_nothing_reads_are_listed(mplus_folder):
    checkpoint = PublishedCheckpoint.open(mplus_folder)
    assert len(checkpoint.ignored) == 2 * LAYERS
    assert all(".encoder_query_proj." in name for name in checkpoint.ignored)


def test_everything_that_was_added_comes_from_the_file(mplus_folder):
    stored = load_file(mplus_folder / WEIGHTS)
    model, _ = load_published(mplus_folder)
    names = {"mplus.begin": "bos_embedding", "mplus.mark": "new_memory_positional_emb"}
    added = [name for name, _ in model.named_parameters() if name.startswith("mplus.") or ".lora_" in name]
    assert len(added) == 2 + LAYERS * (2 * 2 + 6 * 2 * 2)
    for name in added:
        theirs = names.get(name, name).replace(".write.", ".default.").replace(".read.", ".decoder_adapter.")
        if theirs.startswith("mplus.retriever."):
            projector, layer, rest = theirs.removeprefix("mplus.retriever.").split(".", 2)
            theirs = f"model.layers.{layer}.self_attn.{projector}.{rest}"
        assert torch.equal(model.get_parameter(name), stored[theirs]), name


@pytest.mark.parametrize(
    ("kind", "option", "rounded"),
    [
        ("mplus", {}, torch.bfloat16),
        ("mplus", {"rope_inv_freq_dtype": None}, None),
        ("memoryllm", {}, None),
        ("memoryllm", {"rope_inv_freq_dtype": "bfloat16"}, torch.bfloat16),
    ],
)
def test_rounding_of_rotary_frequencies(kind, option, rounded, tmp_path):
    plain = config(kind)
    tensors = state_dict(plain)
    model, memory = load_published(write_folder(tmp_path, plain, tensors), dtype=torch.float64, **option)
    exact, as_asked = PublishedReference(plain, tensors), PublishedReference(plain, tensors, rounded)
    found = model.model.rotary_emb.inv_freq
    assert torch.allclose(found, as_asked.frequencies, rtol=1e-6, atol=0)
    assert torch.allclose(found, exact.frequencies, rtol=1e-6, atol=0) == (rounded is None)
    with torch.no_grad():
        logits = model(TEXT, memory=memory).logits[0]
    assert worst(logits, as_asked.read(TEXT[0])) < 2e-5
    assert (worst(logits, exact.read(TEXT[0])) < 2e-5) == (rounded is None)


def test_dtypes(tmp_path):
    plain = config("mplus")
    tensors = state_dict(plain, torch.bfloat16)
    tensors["ltm_ages.1"] = torch.arange(1001.0, 1021.0)  # in bfloat16 most of these would be equal
    folder = write_folder(tmp_path, plain, tensors)
    model, memory = load_published(folder)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} == {memory.dtype}
    assert memory.states[0].clock - 1 - memory.stores[0].column(1, "birth")[-1] == 1020
    model, memory = load_published(folder, dtype=torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64} == {memory.dtype}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_ages_that_are_no_whole_numbers_are_cut(tmp_path):
    plain = config("mplus")
    tensors = state_dict(plain)
    tensors["ltm_ages.0"] += 0.75
    _, memory = load_published(write_folder(tmp_path, plain, tensors))
    assert torch.equal(-1 - memory.stores[0].column(0, "birth"), tensors["ltm_ages.0"].long())


def test_a_memoryllm_that_was_never_written_starts_empty(tmp_path):
    plain = config("memoryllm")
    tensors = {**state_dict(plain), "initialized": torch.zeros((), dtype=torch.uint8)}
    folder = write_folder(tmp_path, plain, tensors)
    model, memory = load_published(folder, dtype=torch.float64, config={"min_chunk_tokens": 2})
    assert len(memory.states[0].stm[0]) == 0
    with torch.no_grad():
        assert worst(model(TEXT, memory=memory).logits[0], PublishedReference(plain, tensors).read(TEXT[0])) < 2e-5
    memory.write_chunk(SHORT)
    pool = memory.states[0].stm[0].hidden
    assert torch.equal(pool, pool[-2:].repeat(len(pool) // 2, 1))


def test_tied_output_matrix_and_generation_config(tmp_path):
    plain = {**config("mplus"), "tie_word_embeddings": True}
    tensors = state_dict(plain)
    del tensors["lm_head.weight"]
    folder = write_folder(tmp_path, plain, tensors)
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "do_sample": True}))
    model, _ = load_published(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, tensors["model.embed_tokens.weight"])
    assert model.generation_config.temperature == 0.6


@pytest.mark.parametrize("kind", ["mplus", "memoryllm"])
def test_one_tensor_at_a_time(kind, tmp_path, monkeypatch):
    """Every tensor read from the file is gone before the next is, but for the four columns of a long-term layer."""
    alive, most = [], []
    read = TensorFiles.read

    def watched(self, name):
        most.append((sum(one() is not None for one in alive), name))
        tensor = read(self, name)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(TensorFiles, "read", watched)
    plain = config(kind)
    folder = write_folder(tmp_path, plain, state_dict(plain, torch.bfloat16), shards=2)
    model, _ = load_published(folder, dtype=torch.float32)
    assert len(most) >= len([name for name, _ in model.named_parameters()])
    assert max(count for count, name in most if not name.startswith("ltm")) == 0
    assert max(count for count, _ in most) <= 3


def test_parameters_do_not_depend_on_the_file(mplus_folder):
    model, memory = load_published(mplus_folder)
    before = [p.clone() for p in model.parameters()]
    size = (mplus_folder / WEIGHTS).stat().st_size
    (mplus_folder / WEIGHTS).write_bytes(bytes(size))
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert all(bool(rows.hidden.any()) for rows in memory.states[0].stm)


def test_import_command_and_back(mplus_folder, tmp_path):
    (mplus_folder / "tokenizer.json").write_text("{}")
    result = CliRunner().invoke(app, ["import", str(mplus_folder), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    for line in ("M+", "20 rows per layer, 8 retrieved per read", "LoRA of rank 2, alpha 8", "6 tensors that nothing reads"):
        assert line in result.output
    loaded, memory = load_published(mplus_folder)
    again = mplus.from_pretrained(tmp_path / "out").eval()
    memory_again = mplus.Memory.load(tmp_path / "out" / "memory", again)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    for ids in (TEXT, SHORT):
        with torch.no_grad():
            assert torch.equal(again(ids, memory=memory_again).logits, loaded(ids, memory=memory).logits)
        for each in (memory, memory_again):
            each.write(ids.repeat(1, 10))


def test_import_overwrites_nothing(mplus_folder):
    result = CliRunner().invoke(app, ["import", str(mplus_folder), str(mplus_folder)])
    assert result.exit_code == 2
    assert "must be an empty folder" in result.stderr


NEEDED = {
    "mplus": [
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps",
        "rope_theta", "num_tokens", "num_blocks", "num_ltm_blocks", "update_ltm_mode", "update_ltm_frequency",
        "initial_rf_when_moving_stm_to_ltm", "decay_frequency", "add_bos_embedding", "add_decoder_lora",
        "drop_memory_per_layer", "lora_config", "selector_hidden_dim", "num_selector_layers",
    ],
    "memoryllm": ["num_tokens", "num_blocks", "add_bos_embedding", "add_decoder_lora", "drop_memory_per_layer", "lora_config"],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind, keys in NEEDED.items() for key in keys])
def test_missing_key(kind, key, tmp_path):
    plain = config(kind)
    folder = write_folder(tmp_path, {k: v for k, v in plain.items() if k != key}, state_dict(plain))
    # Without its number of long-term blocks a checkpoint looks like one without long-term memory.
    expected = "memory must have shape|num_memory_tokens" if key == "num_ltm_blocks" else f"{key} must be .* which is missing"
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
        ({"num_blocks": 7, "num_memory_tokens": 28}, r"memory must have shape \[3, 20, 32\] by config.json, got \[3, 16, 32\]"),
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
        ({"target_modules": ["q_proj"]}, r"must have model.layers.0.self_attn.k_proj.weight .*but there is .*base_layer"),
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
        "memory", "bos_embedding", "new_memory_positional_emb", "ltm.1", "ltm_keys.2", "ltm_ages.0", "ltm_recall_frequencies.1",
        "lm_head.weight", "model.norm.weight", "model.layers.1.self_attn.q_proj.base_layer.weight",
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
        PublishedCheckpoint.open(write_folder(tmp_path / "more", plain, {**tensors, name: kept, f"{name}.more": kept + 0}))


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
