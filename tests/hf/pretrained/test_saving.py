"""What is saved, what is left out, and that it comes back bit for bit."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import mplus
from benchmarks.quality.architectures.decoders import BY_NAME
from benchmarks.quality.architectures.retrofitted import CHUNK, config_for, retrofit
from mplus.errors import CheckpointError, NotSupported
from mplus.hf.pretrained.shipped import load_decoder, load_tokenizer
from tests.helpers.docstrings import run_examples
from tests.hf.references import TOLERANCE, aligned, error, ids, stir

TEXT = ids(1, 9)
CHUNKS = ids(1, 6 * CHUNK, seed=1)[0]


def trained(name: str = "llama", **changes: Any) -> Any:
    """A wrapped decoder whose additions all have values of their own."""
    return stir(retrofit(BY_NAME[name], **changes).wrapped)


def remembering(model: Any) -> torch.Tensor:
    """Logits of a text behind a memory that reaches into the LTM."""
    memory = model.new_memory()
    memory.write(CHUNKS)
    with torch.no_grad():
        return model(TEXT, memory=memory).logits


def plain(folder: Path) -> tuple[Any, Any]:
    """The decoder in ``folder``, as transformers loads it, and what it had to say."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    return aligned(model), info


def again(folder: Path, **options: Any) -> Any:
    """The wrapped decoder in ``folder``."""
    return aligned(mplus.from_pretrained(folder, **options))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "falcon-new"])
def test_additions_and_base_come_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = trained(name)
    with torch.no_grad():
        model.mplus.begin.mul_(1.5)
    model.save_pretrained(tmp_path, save_base=True)
    loaded = again(tmp_path)
    assert type(loaded).__name__ == type(model).__name__
    assert loaded.mplus_config == model.mplus_config
    assert torch.equal(remembering(loaded), remembering(model))
    assert torch.equal(loaded(TEXT).logits, BY_NAME[name].build()(TEXT).logits)


def test_a_decoder_of_an_earlier_save_is_not_left_to_be_loaded(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path, save_base=True)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2)
        model.mplus.begin.mul_(2)
    with pytest.raises(CheckpointError, match="save_base=True, remove it, or choose another folder"):
        model.save_pretrained(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    model.save_pretrained(tmp_path, save_base=True)
    assert torch.equal(remembering(again(tmp_path)), remembering(model))


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "mixtral", "gpt-oss", "deepseek-v3", "falcon-new", "bloom", "qwen3-next"]
)
def test_saved_base_is_the_original_without_mplus(name: str, tmp_path: Path) -> None:
    original = BY_NAME[name].build()
    trained(name).save_pretrained(tmp_path, save_base=True)
    loaded, info = plain(tmp_path / "base")
    assert not any(info.values()), info
    assert torch.equal(loaded(TEXT).logits, original(TEXT).logits)
    saved = sorted(path.name for path in (tmp_path / "base").iterdir())
    original.save_pretrained(tmp_path / "reference")
    assert saved == sorted(path.name for path in (tmp_path / "reference").iterdir())
    for file in ("config.json", "generation_config.json"):
        assert (tmp_path / "base" / file).read_text() == (tmp_path / "reference" / file).read_text()
    weights, reference = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "reference"))
    assert weights.keys() == reference.keys()
    assert all(torch.equal(weights[key], reference[key]) for key in weights)


def test_the_decoder_that_comes_with_the_package(tmp_path: Path) -> None:
    """Trained weights, tied embeddings, a real tokenizer and text."""
    base, tokenizer = load_decoder(), load_tokenizer()
    prompt = tokenizer("Once upon a time", return_tensors="pt")
    expected = base(**prompt).logits
    model = stir(mplus.wrap(base, config_for(BY_NAME["llama"])))
    model.save_pretrained(tmp_path, save_base=True)
    tokenizer.save_pretrained(tmp_path)
    assert torch.equal(plain(tmp_path / "base")[0](**prompt).logits, expected)
    loaded, words = again(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    said = []
    for one, its_tokenizer in ((model, tokenizer), (loaded, words)):
        memory = one.new_memory(tokenizer=its_tokenizer)
        memory.write("Lily had a red ball. She gave it to Tom. " * 8, source="a story")
        said.append(one.generate(**prompt, memory=memory, max_new_tokens=12, do_sample=False))
        assert memory.sources()[0].tokens > 60
    assert torch.equal(*said)
    assert not torch.equal(said[0], loaded.generate(**prompt, max_new_tokens=12, do_sample=False))


def test_additions_alone_find_their_base_again(tmp_path: Path) -> None:
    BY_NAME["llama"].build().save_pretrained(tmp_path / "decoder")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "decoder")
    model = stir(mplus.wrap(base, config_for(BY_NAME["llama"])))
    model.save_pretrained(tmp_path / "additions")
    assert sorted(path.name for path in (tmp_path / "additions").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    saved = load_file(tmp_path / "additions" / "model.safetensors")
    assert {key for key in saved if not key.startswith("mplus.")} == {
        name for name, _ in model.named_parameters() if ".lora_" in name
    }
    assert torch.equal(remembering(again(tmp_path / "additions")), remembering(model))


@pytest.mark.parametrize("give", ["model", "path"])
def test_a_base_can_be_handed_over(give: str, tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path / "additions")
    with pytest.raises(CheckpointError, match="pass base="):
        mplus.from_pretrained(tmp_path / "additions")
    base: Any = BY_NAME["llama"].build()
    if give == "path":
        base.save_pretrained(tmp_path / "decoder")
        base = tmp_path / "decoder"
    assert torch.equal(remembering(again(tmp_path / "additions", base=base)), remembering(model))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_attention_names_of_mplus_appear_in_no_file(implementation: str, tmp_path: Path) -> None:
    model = retrofit(BY_NAME["llama"], implementation).wrapped
    model.save_pretrained(tmp_path, save_base=True, max_shard_size="20KB")
    model.config.save_pretrained(tmp_path / "config")
    model.generation_config.save_pretrained(tmp_path / "config")
    texts = [path for path in tmp_path.rglob("*") if path.suffix in {".json", ".md"}]
    assert len(texts) >= 6
    assert not [path for path in texts if f"mplus_{implementation}" in path.read_text()]
    assert model.config._attn_implementation == f"mplus_{implementation}"  # saving left it alone


def test_saving_with_output_attentions_set(tmp_path: Path) -> None:
    base = BY_NAME["llama"].build(attn_implementation="eager")
    base.config.output_attentions = True
    mplus.wrap(base, config_for(BY_NAME["llama"])).save_pretrained(tmp_path, save_base=True)
    assert plain(tmp_path / "base")[0].config.output_attentions


def test_tied_embeddings(tmp_path: Path) -> None:
    original = BY_NAME["llama"].build()
    original.config.tie_word_embeddings = True
    original.tie_weights()
    expected = original(TEXT).logits
    mplus.wrap(original, config_for(BY_NAME["llama"])).save_pretrained(tmp_path, save_base=True)
    assert "lm_head.weight" not in load_file(tmp_path / "base" / "model.safetensors")
    loaded, info = plain(tmp_path / "base")
    assert not any(info.values())
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded(TEXT).logits, expected)
    wrapped = again(tmp_path)
    assert torch.equal(wrapped(TEXT).logits, expected)


def test_sharded_base(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path, save_base=True, max_shard_size="20KB")
    assert len(list((tmp_path / "base").glob("model-*-of-*.safetensors"))) > 2
    assert torch.equal(plain(tmp_path / "base")[0](TEXT).logits, BY_NAME["llama"].build()(TEXT).logits)
    assert torch.equal(remembering(again(tmp_path)), remembering(model))


@pytest.mark.two_computations
def test_bfloat16(tmp_path: Path) -> None:
    BY_NAME["llama"].build().save_pretrained(tmp_path / "wide")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype=torch.bfloat16)
    model = stir(mplus.wrap(base, config_for(BY_NAME["llama"], long_term_tokens=0)))  # roundings retrieve other rows
    model.save_pretrained(tmp_path, save_base=True)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    loaded = again(tmp_path)
    assert loaded.dtype == loaded.mplus.begin.dtype == torch.bfloat16
    assert torch.equal(remembering(loaded), remembering(model))
    wide = again(tmp_path, dtype=torch.float32)
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float32}
    # What it computes in bfloat16 is off by more on some processors than on others.
    assert error(remembering(wide), remembering(copy.deepcopy(model).float())) < TOLERANCE


def test_a_pool_comes_back(tmp_path: Path) -> None:
    pool = torch.randn(3, 10, 32)
    model = mplus.wrap(BY_NAME["llama"].build(), config_for(BY_NAME["llama"]), pool=pool)
    model.save_pretrained(tmp_path, save_base=True)
    loaded = again(tmp_path)
    assert torch.equal(loaded.mplus.pool, pool)
    assert torch.equal(remembering(loaded), remembering(model))


def test_a_given_state_dict_is_what_gets_saved(tmp_path: Path) -> None:
    model = trained()
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, True, state, save_base=True)  # positional, as in transformers
    for folder, prefix in ((tmp_path, ""), (tmp_path / "base", "")):
        saved = load_file(folder / "model.safetensors")
        for name, tensor in saved.items():
            assert torch.equal(tensor, state[prefix + name])


def test_other_processes_save_nothing(tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path, False, save_base=True)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_distributed_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotSupported, match="distributed_checkpoint"):
        trained().save_pretrained(tmp_path, distributed_checkpoint=True)


def test_trained_base_weights_are_not_lost_in_silence(tmp_path: Path) -> None:
    model = trained()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
    with torch.no_grad():
        model.model.norm.weight.add_(0.1)
    with pytest.warns(UserWarning, match="save_base=True"):
        model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path, save_base=True)
    assert torch.equal(remembering(again(tmp_path)), remembering(model))


@pytest.mark.parametrize("way", ["PeftModel", "add_adapter"])
def test_a_users_adapter_is_not_saved_with_the_base(way: str, tmp_path: Path) -> None:
    original, base = BY_NAME["llama"].build(), BY_NAME["llama"].build()
    if way == "PeftModel":
        config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
        stir(mplus.wrap(peft.get_peft_model(base, config), config_for(BY_NAME["llama"])))
    else:
        base.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
        adapted = stir(base)(TEXT).logits
        assert not torch.equal(adapted, original(TEXT).logits)
        mplus.wrap(base, config_for(BY_NAME["llama"]))
        assert torch.equal(base(TEXT).logits, adapted)
    base.save_pretrained(tmp_path, save_base=True)
    loaded, info = plain(tmp_path / "base")
    assert not any(info.values())
    assert torch.equal(loaded(TEXT).logits, original(TEXT).logits)
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "default" in name]


def test_resized_embeddings(tmp_path: Path) -> None:
    model = trained()
    model.resize_token_embeddings(113)
    assert model.mplus_engine.vocab_size == 113
    expected = remembering(model)
    model.save_pretrained(tmp_path, save_base=True)
    assert torch.equal(remembering(again(tmp_path)), expected)


# ---------------------------------------------------------------- files that do not fit


def damaged(folder: Path, what: str) -> None:
    weights, config = folder / "model.safetensors", folder / "config.json"
    if what == "no weights":
        weights.unlink()
    elif what == "no config":
        config.unlink()
    elif what == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif what == "another kind":
        config.write_text(json.dumps({"model_type": "llama"}))
    elif what == "other sizes":
        plain = json.loads(config.read_text())
        plain["mplus"]["adapters"]["rank"] = 3
        config.write_text(json.dumps(plain))
    elif what == "no adapters":
        plain = json.loads(config.read_text())
        plain["mplus"]["adapters"] = None
        config.write_text(json.dumps(plain))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no weights", r"model\.safetensors"),
        ("no config", r"config\.json"),
        ("truncated", r"model\.safetensors must be a whole"),
        ("another kind", "'llama'"),
        ("other sizes", r"of another shape .*lora_"),
        ("no adapters", r"superfluous .*lora_"),
    ],
)
def test_a_folder_that_does_not_fit_says_why(what: str, message: str, tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path, save_base=True)
    damaged(tmp_path, what)
    with pytest.raises(CheckpointError, match=message):
        mplus.from_pretrained(tmp_path)


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="must be a folder, or a repository"):
        mplus.from_pretrained(tmp_path / "nothing here")


# ---------------------------------------------------------------- the model card


def test_model_card(tmp_path: Path) -> None:
    model = trained()
    model.config._name_or_path = "someone/tiny-llama"
    model.save_pretrained(tmp_path, tags=["novels: all of them"])
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "mplus"
    assert card.data.base_model == "someone/tiny-llama"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["mplus", "long-term-memory", "novels: all of them"]
    added = sum(tensor.numel() for tensor in load_file(tmp_path / "model.safetensors").values())
    for fact in (
        "# LlamaForCausalLM",
        f"{added:,} parameters",
        "| short-term rows per layer | 10 |",
        "6 with `linear`",
    ):
        assert fact in card.text
    assert "base/" not in card.text


def test_model_card_of_a_local_decoder_names_no_path(tmp_path: Path) -> None:
    model = trained(long_term_tokens=0)
    model.config._name_or_path = str(tmp_path)
    model.save_pretrained(tmp_path / "saved", save_base=True)
    card = ModelCard.load(tmp_path / "saved" / "README.md")
    assert card.data.base_model is None
    assert "in `base/`" in card.text
    assert "retrieved rows" not in card.text


# ---------------------------------------------------------------- the Hub


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """What would have gone to the Hub: calls by name, and the files of every upload."""
    import huggingface_hub

    calls: list[dict[str, Any]] = []

    class Api:
        def __init__(self, token: Any = None) -> None:
            self.token = token

        def create_repo(self, repo_id: str, **options: Any) -> Any:
            calls.append({"call": "create_repo", "repo_id": repo_id, "token": self.token, **options})
            return huggingface_hub.RepoUrl(f"https://huggingface.co/user/{repo_id.rsplit('/', maxsplit=1)[-1]}")

        def create_branch(self, repo_id: str, **options: Any) -> None:
            calls.append({"call": "create_branch", "repo_id": repo_id, **options})

        def upload_folder(self, *, folder_path: Path, allow_patterns: Any, **options: Any) -> str:
            files = [
                path.relative_to(folder_path).as_posix() for path in Path(folder_path).rglob("*") if path.is_file()
            ]
            chosen = sorted(huggingface_hub.utils.filter_repo_objects(files, allow_patterns=allow_patterns))
            copy = tmp_path / f"upload{len(calls)}"
            for file in chosen:
                (copy / file).parent.mkdir(parents=True, exist_ok=True)
                (copy / file).write_bytes((Path(folder_path) / file).read_bytes())
            calls.append({"call": "upload_folder", "files": chosen, "copy": copy, **options})
            return "commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return calls


def test_push_to_hub(uploads: list[dict[str, Any]]) -> None:
    model = trained()
    assert (
        model.push_to_hub("tiny", private=True, token="t", revision="v1", commit_message="first", tags=["x"])
        == "commit"
    )
    created, branch, upload = uploads
    assert (created["repo_id"], created["private"], created["token"]) == ("tiny", True, "t")
    assert (branch["repo_id"], branch["branch"]) == ("user/tiny", "v1")
    assert upload["files"] == ["README.md", "config.json", "model.safetensors"]
    assert (upload["repo_id"], upload["commit_message"], upload["revision"]) == ("user/tiny", "first", "v1")
    card = ModelCard.load(upload["copy"] / "README.md")
    assert card.data.tags == ["mplus", "long-term-memory", "x"]
    loaded = again(upload["copy"], base=BY_NAME["llama"].build())
    assert torch.equal(remembering(loaded), remembering(model))


def test_the_examples_do_what_they_say(
    uploads: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = trained()
    run_examples(mplus.from_pretrained, mplus=mplus, torch=torch, model=model)
    run_examples(type(model).push_to_hub, model=model)
    assert uploads[-1]["files"]


def test_push_to_hub_with_the_base(uploads: list[dict[str, Any]]) -> None:
    model = trained()
    model.push_to_hub("tiny", save_base=True, max_shard_size="20KB")
    assert len([file for file in uploads[-1]["files"] if file.startswith("base/model-0")]) > 2
    assert torch.equal(remembering(again(uploads[-1]["copy"])), remembering(model))


def test_saving_and_pushing_in_one_call(uploads: list[dict[str, Any]], tmp_path: Path) -> None:
    model = trained()
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "private notes.txt").write_text("not to be uploaded")
    model.save_pretrained(folder, push_to_hub=True, save_base=True, commit_message="all")
    assert uploads[0]["repo_id"] == "my-model"
    assert uploads[-1]["files"] == sorted(
        ["README.md", "config.json", "model.safetensors"]
        + [f"base/{file}" for file in ("config.json", "generation_config.json", "model.safetensors")]
    )
    assert uploads[-1]["commit_message"] == "all"


def test_loading_from_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    model, asked = trained(), []
    model.save_pretrained(tmp_path / "inner", save_base=True)

    def download(repo_id: str, **options: Any) -> str:
        asked.append((repo_id, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    # The revision is that of the additions: the decoder's repository need not have it.
    loaded = again("user/tiny", revision="v1", token="t", subfolder="inner")
    assert asked == [("user/tiny", {"revision": "v1", "token": "t"})]
    assert torch.equal(remembering(loaded), remembering(model))
