"""Decoders that accelerate offloads, or that lose their values, after they were wrapped and have memories."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import accelerate
import pytest
import torch

import mplus
from benchmarks.quality.architectures.decoders import BY_NAME
from mplus.errors import InputError, MemoryMismatchError, NotSupported
from tests.memory import tiny

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mplus.memory import Memory

TEXT = tiny.prompts(2)
PLACES = {
    **dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb"), "cpu"),
    **dict.fromkeys(("model.layers.1", "model.layers.2", "lm_head", "mplus"), "disk"),
}
WAYS: dict[str, Callable[[Any, Any], Any]] = {
    "cpu_offload": lambda model, folder: accelerate.cpu_offload(model, "cpu"),
    "disk_offload": lambda model, folder: accelerate.disk_offload(model, folder, "cpu"),
    "dispatch_model": lambda model, folder: accelerate.dispatch_model(
        model, PLACES, main_device="cpu", offload_dir=folder
    ),
}


def written(model: Any, kind: str) -> Memory:
    memory: Memory = model.new_memory(memory_rows=kind)
    memory.write(tiny.ids(150), source="first")
    return memory


@torch.no_grad()
def read(model: Any, memory: Memory) -> torch.Tensor:
    logits: torch.Tensor = model(TEXT, memory=memory).logits
    return logits


@pytest.mark.parametrize(
    ("way", "kind"), [("cpu_offload", "projected"), ("disk_offload", "hidden"), ("dispatch_model", "projected")]
)
def test_memories_go_on_when_the_decoder_is_offloaded(way: str, kind: str, tmp_path: Path) -> None:
    model, whole = tiny.build(), tiny.variant("paper")
    memory, alone = written(model, kind), model(TEXT).logits
    logits, twin = read(model, memory), memory.fork()
    twin.write(tiny.ids(60, 1))
    expected = tiny.content(twin)
    WAYS[way](model, tmp_path)
    assert any(parameter.device.type == "meta" for parameter in model.mplus.parameters())
    assert torch.equal(model(TEXT).logits, alone)
    assert torch.equal(read(model, memory), logits)
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    found = model.generate(TEXT, memory=memory, **options)
    memory.write(tiny.ids(60, 1))
    tiny.assert_content(memory, expected)
    assert torch.equal(read(model, written(model, kind)), logits)
    assert any(parameter.device.type == "meta" for parameter in model.model.parameters())
    assert torch.equal(whole.generate(TEXT, memory=written(whole, kind), **options), found)


@pytest.mark.parametrize("way", [WAYS["cpu_offload"], WAYS["dispatch_model"]], ids=["cpu_offload", "dispatch_model"])
def test_an_offloaded_decoder_is_saved_copied_and_unwrapped(way: Callable[..., Any], tmp_path: Path) -> None:
    model, whole = tiny.build(), tiny.variant("paper")
    expected = read(whole, written(whole, "hidden"))
    way(model, tmp_path / "offloaded")
    if hasattr(model, "hf_device_map"):
        model.save_pretrained(tmp_path / "saved", save_base=True)
        again = mplus.from_pretrained(tmp_path / "saved", check=False)
    else:
        with pytest.raises(NotSupported, match="remove_hook_from_submodules"):
            model.save_pretrained(tmp_path / "saved", save_base=True)
        model.save_pretrained(tmp_path / "saved")
        again = mplus.from_pretrained(tmp_path / "saved", base=BY_NAME["llama"].build(), check=False)
    assert torch.equal(read(again, written(again, "hidden")), expected)
    memory = written(model, "hidden")
    twin_model, twin = copy.deepcopy((model, memory))
    assert torch.equal(read(twin_model, twin), expected)
    alone = model(TEXT).logits
    mplus.unwrap(model)
    assert torch.equal(model(TEXT).logits, alone)


def test_values_that_are_nowhere_are_asked_for() -> None:
    model = tiny.build()
    memory, state = written(model, "hidden"), {name: part.clone() for name, part in model.state_dict().items()}
    rotary = {name: part.clone() for name, part in model.named_buffers()}
    expected, before = read(model, memory), tiny.content(memory)
    model.to("meta")
    calls = (
        lambda: read(model, memory),
        lambda: memory.write(tiny.ids(20)),
        lambda: model.generate(TEXT, memory=memory, max_new_tokens=2),
        model.new_memory,
    )
    for call in calls:
        with pytest.raises(NotSupported, match=r"\(model\.mplus\) is on the meta device, where tensors have no values"):
            call()
    tiny.assert_content(memory, before)
    model.to_empty(device="cpu")
    model.load_state_dict(state)
    with torch.no_grad():
        for name, part in model.named_buffers():
            part.copy_(rotary[name])
    assert torch.equal(read(model, memory), expected)
    with pytest.raises(InputError, match="meta device"):
        model.new_memory(device="meta")


@pytest.mark.parametrize("check", [True, False])
def test_a_decoder_without_values_is_not_wrapped(check: bool) -> None:
    config = mplus.MPlusConfig.from_dict(tiny.SIZES)
    with accelerate.init_empty_weights():
        empty = BY_NAME["llama"].build()
    with pytest.raises(NotSupported, match="weights on the meta device, which have no values: load it first"):
        mplus.wrap(empty, config, check=check)
    whole = BY_NAME["llama"].build()
    alone = whole(TEXT).logits
    with (
        accelerate.init_empty_weights(),
        pytest.raises(NotSupported, match="outside of accelerate's init_empty_weights"),
    ):
        mplus.wrap(whole, config, check=check)
    assert torch.equal(whole(TEXT).logits, alone)
    mplus.wrap(whole, config, check=False)


def test_another_dtype_is_named_with_what_to_do() -> None:
    model = tiny.build()
    memory = written(model, "hidden")
    model.to(torch.bfloat16)
    calls = (lambda: read(model, memory), lambda: memory.write(tiny.ids(20)))
    for call in calls:
        with pytest.raises(MemoryMismatchError, match=r"use memory\.to\(dtype=torch\.bfloat16\)"):
            call()
    moved = memory.to(torch.bfloat16)
    assert read(model, moved).dtype == torch.bfloat16
    moved.write(tiny.ids(20))


def test_weights_in_shared_memory() -> None:
    model = tiny.build()
    memory = written(model, "projected")
    expected = read(model, memory)
    model.share_memory()
    assert torch.equal(read(model, memory), expected)


@pytest.mark.parametrize("way", WAYS)
def test_a_saved_memory_belongs_to_its_decoder_wherever_the_weights_are(way: str, tmp_path: Path) -> None:
    model, whole = tiny.build(), tiny.variant("paper")
    memory = written(whole, "hidden")
    memory.save(tmp_path / "whole")
    WAYS[way](model, tmp_path / "offloaded")
    tiny.assert_content(mplus.Memory.load(tmp_path / "whole", model), tiny.content(memory))
    written(model, "hidden").save(tmp_path / "elsewhere")
    tiny.assert_content(mplus.Memory.load(tmp_path / "elsewhere", whole), tiny.content(memory))


@pytest.mark.parametrize(("part", "named"), [("lora_A.read", "adapters"), ("mplus.begin", "additions")])
def test_a_decoder_that_is_offloaded_is_told_from_another(part: str, named: str, tmp_path: Path) -> None:
    model = tiny.build()
    written(model, "hidden").save(tmp_path / "memory")
    with torch.no_grad():
        next(parameter for name, parameter in model.named_parameters() if part in name).mul_(1.5)
    accelerate.disk_offload(model, tmp_path / "offloaded", "cpu")
    with pytest.raises(MemoryMismatchError, match=f"{named} is"):
        mplus.Memory.load(tmp_path / "memory", model)
