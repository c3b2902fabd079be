"""A wrapped ``PeftModel`` is saved and loaded with its adapters and its memory additions."""

from __future__ import annotations

import copy
import json
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import mplus
from mplus.errors import CheckpointError
from mplus.hf.adapters.lora import is_addition
from mplus.hf.pretrained.load import load_with_tokenizer
from mplus.hf.pretrained.shipped import load_decoder, load_tokenizer
from tests.hf.adapters.test_peft_on_top import KINDS, SIZES, STORY, TASK, moved
from tests.hf.references import error, ids, stir

DECODER = str(files("mplus") / "data" / "stories260K")
TOKENIZER = load_tokenizer()
PROMPT = TOKENIZER("One day, Lily went", return_tensors="pt")


def adapted(kind: str = "LoRA", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """The shipped decoder with an adapter that matters, and a memory whose additions do."""
    base = AutoModelForCausalLM.from_pretrained(DECODER, dtype=dtype)
    outer = moved(peft.get_peft_model(base, copy.deepcopy(KINDS[kind]), **options))
    mplus.wrap(outer, mplus.MPlusConfig.from_dict(SIZES), check=False)
    return different(outer)


@torch.no_grad()
def different(outer: Any) -> Any:
    for name, parameter in outer.named_parameters():
        if is_addition(name.removeprefix("base_model.").removeprefix("model.")):
            parameter.add_(0.05 * torch.randn(parameter.shape).to(parameter))
    return outer.eval()


@torch.no_grad()
def said(model: Any) -> list[torch.Tensor]:
    """Logits without a memory, and behind one."""
    memory = model.new_memory(tokenizer=TOKENIZER)
    memory.write(STORY)
    return [model(**PROMPT).logits, model(**PROMPT, memory=memory).logits]


def same(model: Any, other: Any) -> bool:
    """Whether two models say the same, bit for bit, without a memory and behind one; both must matter."""
    expected = said(model)
    assert not torch.equal(*expected)
    return all(map(torch.equal, said(other), expected))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model with a LoRA adapter and the folder that it was saved in; no test changes either."""
    model, folder = adapted(), tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder, save_base=True)
    return model, folder


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.nightly), torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "IA3", "modules_to_save", "VeRA", "prefix", "p-tuning"])
def test_adapter_and_memory_come_back_bit_for_bit(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = adapted(kind, dtype)
    model.save_pretrained(tmp_path, save_base=True)
    loaded = mplus.from_pretrained(tmp_path, check=False).eval()
    assert type(loaded).__name__ == type(model).__name__ == "PeftModelForCausalLM"
    assert loaded.peft_config["default"].to_dict().keys() == model.peft_config["default"].to_dict().keys()
    assert loaded.mplus_config == model.mplus_config
    assert loaded.get_base_model().dtype == dtype
    assert same(model, loaded)


def test_several_adapters_with_their_names_scales_and_which_of_them_act(tmp_path: Path) -> None:
    model = adapted()
    for name in ("second", "third"):
        model.add_adapter(name, peft.LoraConfig(r=2, lora_alpha=3, use_rslora=True, target_modules=["k_proj"], **TASK))
    stir(model, seed=5)
    layer = model.get_base_model().model.layers[1].self_attn.k_proj
    layer.set_scale("second", 2.5)
    for active in (["second"], ["default", "third"]):
        model.base_model.set_adapter(active)
        model.save_pretrained(tmp_path / active[0], save_base=True)
        loaded = mplus.from_pretrained(tmp_path / active[0], check=False).eval()
        assert list(loaded.peft_config) == ["default", "second", "third"]
        assert loaded.active_adapters == active
        assert loaded.get_base_model().model.layers[1].self_attn.k_proj.scaling == layer.scaling
        assert same(model, loaded)
    assert json.loads((tmp_path / "second" / "mplus" / "adapters.json").read_text())["active"] == ["second"]
    model.save_pretrained(tmp_path / "some", selected_adapters=["third"])
    some = mplus.from_pretrained(tmp_path / "some", base=load_decoder(), check=False)
    assert list(some.peft_config) == ["third"]


def test_an_adapter_in_half_precision_stays_so(tmp_path: Path) -> None:
    model = adapted(dtype=torch.bfloat16, autocast_adapter_dtype=False)
    model.save_pretrained(tmp_path, save_base=True)
    loaded = mplus.from_pretrained(tmp_path, check=False).eval()
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert same(model, loaded)


def test_what_is_trainable_after_loading(saved: tuple[Any, Path]) -> None:
    for trainable in (False, True):
        loaded = mplus.from_pretrained(saved[1], check=False, is_trainable=trainable)
        named = {name: parameter.requires_grad for name, parameter in loaded.named_parameters()}
        assert {value for name, value in named.items() if ".default." in name} == {trainable}
        ours = [name for name in named if is_addition(name.removeprefix("base_model.model."))]
        assert all(named[name] for name in ours)
        assert not any(named[name] for name in set(named).difference(ours) if ".default." not in name)


def test_a_base_is_found_again_handed_over_or_named_as_missing(tmp_path: Path) -> None:
    load_decoder().save_pretrained(tmp_path / "decoder")
    model = moved(
        peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "decoder"), copy.deepcopy(KINDS["LoRA"]))
    )
    different(mplus.wrap(model, mplus.MPlusConfig.from_dict(SIZES), check=False))
    model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "mplus" / "base").exists()
    assert same(model, mplus.from_pretrained(tmp_path / "saved", check=False).eval())
    given = AutoModelForCausalLM.from_pretrained(tmp_path / "decoder")
    assert same(model, mplus.from_pretrained(tmp_path / "saved", base=given, check=False).eval())
    with_its_own = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "decoder"), tmp_path / "saved"
    )
    loaded = mplus.from_pretrained(tmp_path / "saved", base=with_its_own, check=False)
    assert loaded is with_its_own
    assert same(model, loaded)
    model.get_base_model().config._name_or_path = None
    model.save_pretrained(tmp_path / "nameless")
    with pytest.raises(CheckpointError, match="pass base="):
        mplus.from_pretrained(tmp_path / "nameless")


def test_peft_loads_the_adapter_alone_and_mplus_the_memory_alone(saved: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = saved
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    TOKENIZER.save_pretrained(tmp_path)
    alone = peft.PeftModel.from_pretrained(load_decoder(), tmp_path)
    assert torch.equal(alone(**PROMPT).logits, model(**PROMPT).logits)
    automatic = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(automatic(**PROMPT).logits, model(**PROMPT).logits)
    inner = mplus.from_pretrained(tmp_path / "mplus", check=False)
    assert not hasattr(inner, "peft_config")
    with model.disable_adapter():
        expected = said(model)
    assert all(map(torch.equal, said(inner), expected))
    assert same(model, load_with_tokenizer(tmp_path)[0])
    card = (tmp_path / "README.md").read_text()
    assert card.count("mplus.from_pretrained(") == 1
    model.save_pretrained(tmp_path, save_base=True)
    assert (tmp_path / "README.md").read_text().count("mplus.from_pretrained(") == 1


def test_an_adapter_put_on_a_wrapped_decoder_is_saved_with_the_memory_when_wrap_knows_of_it(tmp_path: Path) -> None:
    decoder = mplus.wrap(load_decoder(), mplus.MPlusConfig.from_dict(SIZES), check=False)
    outer = moved(peft.get_peft_model(decoder, copy.deepcopy(KINDS["LoRA"])))
    different(mplus.wrap(outer)).save_pretrained(tmp_path, save_base=True)
    assert same(outer, mplus.from_pretrained(tmp_path, check=False).eval())


def test_a_folder_of_an_adapter_alone_says_so(tmp_path: Path) -> None:
    decoder = mplus.wrap(load_decoder(), mplus.MPlusConfig.from_dict(SIZES), check=False)
    peft.get_peft_model(decoder, copy.deepcopy(KINDS["LoRA"])).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"an adapter of PEFT, for PeftModel\.from_pretrained"):
        mplus.from_pretrained(tmp_path)


@pytest.mark.parametrize("what", ["garbled", "missing"])
def test_a_damaged_folder_says_what_is_wrong(what: str, saved: tuple[Any, Path], tmp_path: Path) -> None:
    shutil.copytree(saved[1], tmp_path, dirs_exist_ok=True)
    described = tmp_path / "mplus" / "adapters.json"
    described.write_text("[1" if what == "garbled" else '{"adapters": ["other"], "active": [], "scaling": {}}')
    with pytest.raises(CheckpointError, match=r"must name the adapters" if what == "garbled" else "'other'"):
        mplus.from_pretrained(tmp_path)


def test_merged_for_good_and_loaded_around_the_merged_decoder(tmp_path: Path) -> None:
    wide = torch.float64  # merging rounds
    model = adapted(dtype=wide)
    model.save_pretrained(tmp_path)
    expected = said(model)
    base = AutoModelForCausalLM.from_pretrained(DECODER, dtype=wide)
    merged = peft.PeftModel.from_pretrained(base, tmp_path).merge_and_unload()
    loaded = mplus.from_pretrained(tmp_path / "mplus", base=merged, check=False).eval()
    for found, one in zip(said(loaded), expected, strict=True):
        assert found.dtype == wide
        assert error(found, one) < 1e-6


def test_pushing_uploads_the_same_files(
    saved: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    uploaded: list[set[str]] = []

    class Api:
        def __init__(self, token: Any = None) -> None:
            assert token == "t"

        def create_repo(self, repo_id: str, **_: Any) -> Any:
            return huggingface_hub.RepoUrl(f"https://huggingface.co/user/{repo_id}")

        def upload_folder(self, *, folder_path: Path, **_: Any) -> str:
            uploaded.append(names(Path(folder_path)))
            return "commit"

    def names(folder: Path) -> set[str]:
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    model, _ = saved
    assert model.push_to_hub("tiny", token="t", save_base=True, max_shard_size="200KB") == "commit"
    model.save_pretrained(tmp_path, save_base=True, max_shard_size="200KB")
    assert uploaded == [names(tmp_path)]
    assert len([file for file in names(tmp_path) if file.startswith("mplus/base/model-0")]) > 1
    assert {"adapter_config.json", "adapter_model.safetensors", "mplus/model.safetensors"} <= uploaded[0]


def test_a_trainer_goes_on_from_its_checkpoint_with_adapter_and_additions(tmp_path: Path) -> None:
    texts = [{"input_ids": row, "labels": row} for row in ids(8, 9, seed=4)]

    def trainer(model: Any, folder: str) -> Any:
        arguments = TrainingArguments(
            output_dir=str(tmp_path / folder), max_steps=2, per_device_train_batch_size=2, learning_rate=0.01,
            use_cpu=True, report_to=[], save_strategy="steps", save_steps=1, disable_tqdm=True,
        )  # fmt: skip
        return Trainer(model, arguments, train_dataset=texts)

    torch.manual_seed(1)
    whole = adapted()
    trainer(whole, "run").train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    assert set(load_file(checkpoint / "adapter_model.safetensors")).isdisjoint(
        load_file(checkpoint / "mplus" / "model.safetensors")
    )
    torch.manual_seed(2)
    second = different(adapted())  # other additions
    trainer(second, "run").train(resume_from_checkpoint=str(checkpoint))
    expected = dict(whole.named_parameters())
    for name, parameter in second.named_parameters():
        assert torch.equal(parameter, expected[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("first", ["adapter", "memory"])
def test_adapters_in_a_decoder_without_a_peft_model_come_back(first: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(DECODER, dtype=dtype)
    if first == "memory":
        mplus.wrap(model, mplus.MPlusConfig.from_dict(SIZES), check=False)
    for name in ("one", "two"):
        model.add_adapter(copy.deepcopy(KINDS["LoRA"]), name)
    moved(model)
    model.set_adapter("one")
    if first == "adapter":
        mplus.wrap(model, mplus.MPlusConfig.from_dict(SIZES), check=False)
    stir(model, seed=8).eval().model.layers[0].self_attn.q_proj.set_scale("one", 1.5)
    model.save_pretrained(tmp_path, save_base=True)
    assert "default" not in str(sorted(load_file(tmp_path / "model.safetensors")))
    automatic = [AutoModelForCausalLM.from_pretrained(tmp_path)] if dtype == torch.float32 else []
    for loaded in (mplus.from_pretrained(tmp_path, check=False), *automatic):
        assert list(loaded.peft_config) == ["one", "two"]
        assert loaded.active_adapters() == ["one"]
        assert same(model, loaded.eval())
        assert not [name for name, p in loaded.named_parameters() if p.requires_grad and not is_addition(name)]
    trainable = mplus.from_pretrained(tmp_path, check=False, is_trainable=True)
    assert {name.split(".")[-2] for name, p in trainable.named_parameters() if p.requires_grad and "lora" in name} == {
        "one", "read", "write",
    }  # fmt: skip


def test_unwrapping_below_an_adapter_leaves_the_adapter() -> None:
    plain = moved(peft.get_peft_model(load_decoder(), copy.deepcopy(KINDS["LoRA"]))).eval()
    decoder = mplus.wrap(load_decoder(), mplus.MPlusConfig.from_dict(SIZES), check=False)
    outer = peft.get_peft_model(decoder, copy.deepcopy(KINDS["LoRA"])).eval()
    outer.load_state_dict(plain.state_dict(), strict=False)
    for model in (outer, mplus.wrap(outer)):
        assert torch.equal(model(**PROMPT).logits, plain(**PROMPT).logits)
    assert mplus.unwrap(outer) is outer
    assert type(outer) is type(plain)
    assert list(outer.state_dict()) == list(plain.state_dict())
    assert torch.equal(outer(**PROMPT).logits, plain(**PROMPT).logits)
