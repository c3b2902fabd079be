"""Loading checkpoints in the published layout, against a flat computation over their tensors."""

from __future__ import annotations

import json
import weakref

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import mplus
from mplus.cli import app
from mplus.errors import ConfigError
from mplus.interop import PublishedCheckpoint, load_published
from mplus.interop.tensors import WEIGHTS, TensorFiles
from tests.references.published import PublishedReference
from tests.references.published_layout import LAYERS, LTM_BLOCKS, POOL_BLOCKS, K, config, state_dict, write_folder

pytestmark = pytest.mark.two_computations

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
    return torch.stack(model.mplus_engine.write(memory.snapshot(), ids).of(0).hidden)


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
    assert (made.memory_tokens_per_chunk, made.short_term_tokens, made.retrieved_tokens) == (
        K,
        POOL_BLOCKS * K,
        LTM_BLOCKS * K,
    )
    assert made.retriever.options == {"width": 8, "layers": 2, "score": "sigmoid_mean"}
    assert (made.adapters.rank, made.adapters.alpha, made.adapters.dropout, made.adapters.shared) == (
        2,
        8.0,
        0.1,
        False,
    )
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
    for line in (
        "M+",
        "20 rows per layer, 8 retrieved per read",
        "LoRA of rank 2, alpha 8",
        "6 tensors that nothing reads",
    ):
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
