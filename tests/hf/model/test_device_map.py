"""Decoders spread out by accelerate, some of their weights on the meta device and in files until they are needed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from transformers import AutoModelForCausalLM

import mplus
from benchmarks.quality.architectures.decoders import BY_NAME
from benchmarks.quality.architectures.retrofitted import CHUNK, config_for, retrofit
from mplus.hf.adapters.lora import is_addition
from mplus.hf.pretrained.save import load_additions
from tests.hf.references import TOLERANCE, aligned, error, ids, stir

pytestmark = pytest.mark.two_computations

TEXT, CHUNKS = ids(1, 9), ids(1, 6 * CHUNK, seed=1)[0]
NAMES = {
    "llama": ("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head"),
    "gpt2": ("transformer.wte", "transformer.wpe", "transformer.drop", "transformer.h", "transformer.ln_f", "lm_head"),
}


def device_map(family: str, *on_disk: str) -> dict[str, str]:
    """Everything on the CPU but the named parts ("1": layer 1, else part of a name)."""
    places = {}
    for name in NAMES[family]:
        for part in [f"{name}.{index}" for index in range(3)] if name.endswith(("layers", ".h")) else [name]:
            places[part] = "disk" if part.rpartition(".")[2] in on_disk else "cpu"
    return places


@torch.no_grad()
def remembering(model: Any) -> torch.Tensor:
    """Logits behind a memory that reaches into the LTM."""
    memory = model.new_memory()
    memory.write(CHUNKS)
    return model(TEXT, memory=memory).logits


@pytest.fixture(params=["llama", "gpt2"], scope="module")
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def saved(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with additions and base."""
    folder = tmp_path_factory.mktemp(family) / "saved"
    stir(retrofit(BY_NAME[family]).wrapped).save_pretrained(folder, save_base=True)
    return folder


@pytest.fixture(scope="module")
def whole(saved: Path) -> Any:
    """The decoder in the folder, not in pieces; nothing a test does changes it."""
    return mplus.from_pretrained(saved)


@pytest.fixture(scope="module")
def remembered(whole: Any) -> torch.Tensor:
    """What the whole decoder remembers."""
    return remembering(whole)


def on_meta(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.device.type == "meta"}


PLACES = [(), ("1",), ("0", "2"), ("embed_tokens", "wte", "lm_head"), ("0", "1", "2", "norm", "ln_f")]


@pytest.mark.parametrize(
    "places",
    [pytest.param(places, marks=pytest.mark.nightly if len(places) == 1 else ()) for places in PLACES],
    ids=lambda places: " ".join(places) or "cpu",
)
def test_loading_in_pieces_and_wrapping(
    family: str, places: tuple[str, ...], saved: Path, whole: Any, remembered: torch.Tensor, tmp_path: Path
) -> None:
    if family == "gpt2" and "lm_head" in places:
        places = ("0",)  # its head is its embedding: accelerate keeps tied weights in one place
    options = {"device_map": device_map(family, *places), "offload_folder": tmp_path}
    base = AutoModelForCausalLM.from_pretrained(saved / "base", **options)
    assert bool(on_meta(base)) == bool(places)
    alone = base(TEXT).logits
    model = mplus.wrap(base, config_for(BY_NAME[family]))
    assert torch.equal(model(TEXT).logits, alone)
    load_additions(model, {name: t for name, t in whole.state_dict().items() if is_addition(name)}, "test")
    assert error(remembering(model), remembered) < TOLERANCE
    generated = model.generate(TEXT, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, whole.generate(TEXT, max_new_tokens=4, do_sample=False))
    mplus.unwrap(model)
    assert torch.equal(model(TEXT).logits, alone)


@pytest.mark.parametrize("places", PLACES[:3], ids=lambda places: " ".join(places) or "cpu")
@pytest.mark.parametrize(
    "load",
    [pytest.param(mplus.from_pretrained, marks=pytest.mark.nightly), AutoModelForCausalLM.from_pretrained],
    ids=["mplus", "Auto"],
)
def test_loading_a_wrapped_decoder_in_pieces(
    family: str, load: Any, places: tuple[str, ...], saved: Path, remembered: torch.Tensor, tmp_path: Path
) -> None:
    options = {"device_map": device_map(family, *places), "offload_folder": tmp_path}
    model = load(saved, **options)
    assert bool(on_meta(model)) == bool(places)
    assert not [name for name in on_meta(model) if ".lora_" in name or name.startswith("mplus.")]
    assert error(remembering(model), remembered) < TOLERANCE


def test_spreading_out_a_wrapped_decoder(
    family: str, saved: Path, whole: Any, remembered: torch.Tensor, tmp_path: Path
) -> None:
    alone, own = whole(TEXT).logits, mplus.from_pretrained(saved)
    places = {**device_map(family, "1"), "mplus": "cpu"}
    assert set(accelerate.infer_auto_device_map(own).values()) <= {"cpu", 0}
    model = accelerate.dispatch_model(own, places, main_device="cpu", offload_dir=tmp_path)
    assert any(".layers.1." in name or ".h.1." in name for name in on_meta(model))
    assert error(remembering(model), remembered) < TOLERANCE
    assert error(model(TEXT).logits, alone) < TOLERANCE


def test_layers_are_not_split(family: str) -> None:
    """accelerate knows what must stay together by the names of classes."""
    model = retrofit(BY_NAME[family]).wrapped
    layer = model.mplus_engine.retrofit.anatomy.layers[0]
    size = sum(parameter.numel() * 4 for parameter in layer.parameters())
    rest = sum(parameter.numel() * 4 for parameter in model.parameters()) - 3 * size
    places = accelerate.infer_auto_device_map(
        model, {"cpu": int(rest + 1.5 * size), "disk": 10**9}, no_split_module_classes=model._no_split_modules
    )
    assert "disk" in places.values()
    split = [name for name in places if any(part in name for part in (".layers.", ".h.")) and name.count(".") > 2]
    assert split == []


def test_saving_a_decoder_in_pieces(family: str, saved: Path, tmp_path: Path) -> None:
    options = {"device_map": device_map(family, "1"), "offload_folder": tmp_path}
    model = mplus.from_pretrained(saved, **options)
    model.save_pretrained(tmp_path / "again", save_base=True)
    whole, again = (aligned(mplus.from_pretrained(folder)) for folder in (saved, tmp_path / "again"))
    for name, parameter in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], parameter), name
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "again" / "base")
    assert torch.equal(aligned(plain)(TEXT).logits, BY_NAME[family].build()(TEXT).logits)


def test_gradients_reach_the_adapters_of_a_decoder_in_pieces(family: str, saved: Path, tmp_path: Path) -> None:
    def gradients(model: Any) -> dict[str, torch.Tensor]:
        memory = model.new_memory()
        memory.write(CHUNKS[:CHUNK])
        model(TEXT, memory=memory, labels=TEXT).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if ".read." in name}

    options = {"device_map": device_map(family, "1"), "offload_folder": tmp_path}
    found, expected = gradients(mplus.from_pretrained(saved, **options)), gradients(mplus.from_pretrained(saved))
    assert found.keys() == expected.keys()
    assert max(error(found[name], expected[name]) for name in expected) < 5 * TOLERANCE


def test_a_deep_copy_of_a_decoder_in_pieces(family: str, saved: Path, tmp_path: Path) -> None:
    options = {"device_map": device_map(family, "1"), "offload_folder": tmp_path}
    model = mplus.from_pretrained(saved, **options)
    twin = copy.deepcopy(model)
    assert twin.mplus_engine.model is twin
    assert torch.equal(remembering(twin), remembering(model))
