"""The adapters "write" and "read" next to each other, next to a user's own, and in one graph."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from attrs import evolve
from safetensors.torch import load_file

import mplus
from benchmarks.quality.architectures import oracle
from benchmarks.quality.architectures.decoders import BY_NAME
from benchmarks.quality.architectures.retrofitted import CHUNK, K, Pair, config_for, retrofit
from mplus.errors import ConfigError, NotSupported
from tests.hf.references import TOLERANCE, error, ids, injected, merged, stir, write_and_read

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

pytestmark = pytest.mark.two_computations

FAMILIES = ("llama", "gpt2", "phi3", "falcon-new")
"""Separate projections; transposed ones; fused ones; attention without a pluggable function."""


@pytest.fixture(params=FAMILIES)
def pair(request: pytest.FixtureRequest) -> Pair:
    made = retrofit(BY_NAME[request.param])
    stir(made.wrapped)
    return made


def test_write_runs_with_the_write_adapter(pair: Pair) -> None:
    memory, chunk = pair.wrapped.new_memory(), pair.text(CHUNK)
    memory.write(chunk)
    found = [rows.hidden for rows in memory.states[0].stm]

    def reference(adapter: str) -> list[Tensor]:
        plain = merged(pair.plain, pair.wrapped, adapter)
        nothing = [begin[:0] for begin in pair.begin]
        return oracle.write(plain, chunk, pair.begin, nothing, mark=pair.mark, k=K)

    for rows, expected, other in zip(found, reference("write"), reference("read"), strict=True):
        assert error(rows, expected) < TOLERANCE
        assert error(rows, other) > 0.1


def test_read_runs_with_the_read_adapter(pair: Pair) -> None:
    memory, text = pair.memory(), pair.text(7)
    view = memory.snapshot()[0]
    with torch.no_grad():
        found = pair.wrapped(text, memory=memory).logits

    def reference(adapter: str) -> Tensor:
        plain = merged(pair.plain, pair.wrapped, adapter)
        return oracle.read_with_retrieval(plain, text, pair.retrieving(view), pair.rows(view))

    assert error(found, reference("read")) < TOLERANCE
    assert error(found, reference("write")) > 0.1


def test_without_memory_no_adapter_acts(pair: Pair) -> None:
    text = pair.text(9)
    pair.memory()  # a write before must leave nothing behind
    base = BY_NAME[pair.plain.config.model_type if pair.plain.config.model_type != "falcon" else "falcon-new"].build()
    assert torch.equal(pair.wrapped(text).logits, base(text).logits)


def test_shared_adapter_writes_and_reads() -> None:
    pair = retrofit(BY_NAME["llama"], adapters={"rank": 2, "shared": True}, retrieved_tokens=0, long_term_tokens=0)
    stir(pair.wrapped)
    names = {name.split(".")[-2] for name in pair.wrapped.state_dict() if ".lora_" in name}
    assert names == {"write"}
    memory, text = pair.memory(chunks=1), pair.text(7)
    plain = merged(pair.plain, pair.wrapped, "write")
    rows = [torch.cat([b, s.hidden]) for b, s in zip(pair.begin, memory.states[0].stm, strict=True)]
    assert error(pair.wrapped(text, memory=memory).logits, oracle.read(plain, text, rows)) < TOLERANCE


@pytest.mark.parametrize("second", [CHUNK, K, 2], ids=["longer than K", "equal to K", "shorter than K"])
def test_gradients_of_two_writes_and_a_read_are_those_of_the_oracle(second: int) -> None:
    pair = retrofit(BY_NAME["llama"], long_term_tokens=0)
    model = stir(pair.wrapped)
    chunks, text = [pair.text(CHUNK, seed=1), pair.text(second, seed=2)], pair.text(7, seed=3)
    write_and_read(model, chunks, text).backward()

    writer, reader = injected(pair.plain, model, "write"), injected(pair.plain, model, "read")
    begin = [row.clone().requires_grad_() for row in pair.begin]
    mark = pair.mark.clone().requires_grad_()
    rows = [row[:0] for row in begin]
    for chunk in chunks:
        context = [part[-K:] for part in rows]
        made = oracle.write(writer, chunk, begin, context, mark=mark, k=K)
        rows = [torch.cat([old, new]) for old, new in zip(rows, made, strict=True)]
    logits = oracle.read(reader, text, [torch.cat(both) for both in zip(begin, rows, strict=True)])
    torch.nn.functional.cross_entropy(logits[0, :-1], text[0, 1:]).backward()

    compared = 0
    for plain, adapter in ((writer, "write"), (reader, "read")):
        for name, parameter in plain.named_parameters():
            if ".lora_" in name:
                found = model.get_parameter(name.replace(".default.", f".{adapter}.")).grad
                expected = parameter.grad
                assert expected.abs().max() > 1e-4, name
                assert error(found, expected) < 5 * TOLERANCE, name
                compared += 1
    assert compared == 2 * sum(".lora_B.write." in name for name, _ in model.named_parameters()) * 2
    assert error(model.mplus.mark.grad[0, 0], mark.grad) < 5 * TOLERANCE
    for found, expected in zip(model.mplus.begin.grad, begin, strict=True):
        assert error(found, expected.grad) < 5 * TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_no_bit(family: str) -> None:
    model = stir(retrofit(BY_NAME[family], long_term_tokens=0).wrapped).train()
    chunks, text = [ids(1, CHUNK, 1), ids(1, 2, 2)], ids(1, 7, 3)
    layer, calls = model.mplus_engine.retrofit.anatomy.specs[0].layer, []
    inner = next(module for module in layer.modules() if module is not layer)
    handle = inner.register_forward_pre_hook(lambda *_: calls.append(None))

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        calls.clear()
        write_and_read(model, chunks, text).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain, once = gradients(), len(calls)
    model.gradient_checkpointing_enable()
    checkpointed, twice = gradients(), len(calls)
    handle.remove()
    assert twice > once, "nothing was recomputed, so nothing was tested"
    assert plain.keys() == checkpointed.keys()
    assert any(".lora_A.write." in name for name in plain)
    assert any(".lora_A.read." in name for name in plain)
    assert [name for name in plain if not torch.equal(plain[name], checkpointed[name])] == []


# ---------------------------------------------------------------- a user's own adapters


def users_own(base: Any, name: str = "default", **options: Any) -> Any:
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"], **options)
    return stir(peft.get_peft_model(base, config, adapter_name=name), seed=5)


@pytest.fixture
def adapted() -> tuple[Pair, Any]:
    """A pair whose decoder has a user's adapter inside a PeftModel; the plain one has it merged."""
    architecture = BY_NAME["llama"]
    outer = mplus.wrap(users_own(architecture.build()), config_for(architecture))
    model = stir(outer.get_base_model(), seed=2)
    return Pair(model, merged(architecture.build(attn_implementation="eager"), model, "default")), outer


def test_users_adapter_stays_active_in_writes_and_reads(adapted: tuple[Pair, Any]) -> None:
    pair, outer = adapted
    text, memory = pair.text(7), pair.wrapped.new_memory()
    memory.write(pair.text(CHUNK, seed=1))
    writer, reader = (merged(pair.plain, pair.wrapped, adapter) for adapter in ("write", "read"))
    nothing = [begin[:0] for begin in pair.begin]
    rows = oracle.write(writer, pair.text(CHUNK, seed=1), pair.begin, nothing, mark=pair.mark, k=K)
    assert max(map(error, [one.hidden for one in memory.states[0].stm], rows)) < TOLERANCE
    expected = oracle.read(reader, text, [torch.cat(both) for both in zip(pair.begin, rows, strict=True)])
    for model in (outer, pair.wrapped):
        assert error(model(input_ids=text, memory=memory).logits, expected) < TOLERANCE
    generated = outer.generate(input_ids=text, memory=memory, max_new_tokens=5, do_sample=False)
    rows = [torch.cat(both) for both in zip(pair.begin, rows, strict=True)]
    assert torch.equal(generated, oracle.generate_greedy(reader, text, rows, 5))


def test_wrapping_changes_no_bit_of_an_adapted_model() -> None:
    text, architecture = ids(1, 7), BY_NAME["llama"]
    outer = users_own(architecture.build())
    before, trainable = outer(input_ids=text).logits, {n for n, p in outer.named_parameters() if p.requires_grad}
    mplus.wrap(outer, config_for(architecture))
    assert torch.equal(outer(input_ids=text).logits, before)
    after = {n for n, p in outer.named_parameters() if p.requires_grad}
    assert {n for n in after if ".write." not in n and ".read." not in n and ".mplus." not in n} == trainable
    assert outer.active_adapter == "default"


def test_saving_a_users_adapter_is_not_affected(adapted: tuple[Pair, Any], tmp_path: Path) -> None:
    _, outer = adapted
    outer.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == 12  # 3 layers, q and v, A and B
    assert not any("write" in name or "read" in name for name in saved)
    loaded = peft.PeftModel.from_pretrained(BY_NAME["llama"].build(), tmp_path)
    text = ids(1, 7)
    assert torch.equal(loaded(input_ids=text).logits, outer(input_ids=text).logits)


def test_unwrapping_leaves_a_users_adapter() -> None:
    text, architecture = ids(1, 7), BY_NAME["llama"]
    outer = users_own(architecture.build())
    before, names, kinds = outer(input_ids=text).logits, set(outer.state_dict()), _kinds(outer)
    mplus.wrap(outer, config_for(architecture))
    assert mplus.unwrap(outer) is outer
    assert torch.equal(outer(input_ids=text).logits, before)
    assert set(outer.state_dict()) == names
    assert _kinds(outer) == kinds
    assert list(outer.peft_config) == ["default"]
    with outer.disable_adapter():
        assert torch.equal(outer(input_ids=text).logits, architecture.build()(text).logits)


def _kinds(model: Any) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def test_switching_a_users_adapters_leaves_ours_trainable(adapted: tuple[Pair, Any]) -> None:
    pair, outer = adapted
    outer.add_adapter("second", peft.LoraConfig(r=3, target_modules=["q_proj"]))
    outer.set_adapter("second")
    ours = [p for n, p in pair.wrapped.named_parameters() if ".write." in n or ".read." in n]
    assert all(parameter.requires_grad for parameter in ours)
    text, memory = pair.text(7), pair.memory(chunks=1)
    outer.set_adapter("default")
    with_default = outer(input_ids=text, memory=memory).logits
    outer.set_adapter("second")
    assert error(outer(input_ids=text, memory=memory).logits, with_default) > 0.1


def test_a_users_adapter_put_on_a_wrapped_decoder_acts_besides_ours() -> None:
    pair = retrofit(BY_NAME["llama"], long_term_tokens=0)
    stir(pair.wrapped)
    memory, text = pair.memory(chunks=1), pair.text(7)
    outer = users_own(pair.wrapped)
    rows = [torch.cat([b, s.hidden]) for b, s in zip(pair.begin, memory.states[0].stm, strict=True)]
    reader = merged(pair.plain, pair.wrapped, "read", "default")
    assert error(outer(input_ids=text, memory=memory).logits, oracle.read(reader, text, rows)) < TOLERANCE
    alone = merged(pair.plain, pair.wrapped, "default")
    assert error(outer(input_ids=text).logits, alone(text).logits) < TOLERANCE


@pytest.mark.parametrize("name", ["write", "read"])
def test_a_users_adapter_under_one_of_our_names_is_refused(name: str) -> None:
    outer = users_own(BY_NAME["llama"].build(), name=name)
    before = outer(input_ids=ids(1, 7)).logits
    with pytest.raises(NotSupported, match=f"{name!r}"):
        mplus.wrap(outer, config_for(BY_NAME["llama"]))
    assert torch.equal(outer(input_ids=ids(1, 7)).logits, before)


def test_a_merged_adapter_is_refused() -> None:
    outer = users_own(BY_NAME["llama"].build())
    outer.merge_adapter()
    with pytest.raises(NotSupported, match="merged"):
        mplus.wrap(outer, config_for(BY_NAME["llama"]))


def test_a_merged_adapter_beside_none_of_ours_is_refused_when_saving(tmp_path: Path) -> None:
    outer = users_own(BY_NAME["llama"].build())
    outer.merge_adapter()
    mplus.wrap(outer, evolve(config_for(BY_NAME["llama"]), adapters=None))
    for model in (outer, outer.get_base_model()):
        with pytest.raises(NotSupported, match="merged"):
            model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    outer.unmerge_adapter()
    with pytest.warns(UserWarning, match="weights have changed since mplus.wrap"):
        outer.save_pretrained(tmp_path)


def reading(model: Any, memory: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids(1, 7), memory=memory).logits


def test_merging_a_users_adapter_leaves_ours_at_work(adapted: tuple[Pair, Any]) -> None:
    pair, outer = adapted
    memory = pair.memory(chunks=1)
    expected, alone = reading(outer, memory), reading(outer, None)
    outer.merge_adapter()
    assert error(reading(outer, memory), expected) < TOLERANCE
    outer.unmerge_adapter()
    assert error(reading(outer, memory), expected) < TOLERANCE
    decoder = outer.merge_and_unload()
    assert decoder is pair.wrapped
    assert not hasattr(decoder, "peft_config")
    assert error(reading(decoder, memory), expected) < TOLERANCE
    assert error(reading(decoder, None), alone) < TOLERANCE
    assert error(expected, alone) > 0.1


def test_unloading_a_users_adapter_leaves_ours_at_work(adapted: tuple[Pair, Any]) -> None:
    pair, outer = adapted
    decoder = outer.unload()
    text, memory = pair.text(7), decoder.new_memory()
    memory.write(pair.text(CHUNK, seed=1))
    plain = BY_NAME["llama"].build(attn_implementation="eager")
    writer, reader = (merged(plain, decoder, adapter) for adapter in ("write", "read"))
    rows = oracle.write(writer, pair.text(CHUNK, seed=1), pair.begin, [b[:0] for b in pair.begin], mark=pair.mark, k=K)
    expected = oracle.read(reader, text, [torch.cat(both) for both in zip(pair.begin, rows, strict=True)])
    assert error(decoder(text, memory=memory).logits, expected) < TOLERANCE
    assert torch.equal(decoder(text).logits, BY_NAME["llama"].build()(text).logits)


def test_a_disabled_users_adapter_leaves_ours_at_work(adapted: tuple[Pair, Any]) -> None:
    pair, outer = adapted
    trainable = {name for name, parameter in outer.named_parameters() if parameter.requires_grad}
    text = pair.text(7)
    with outer.disable_adapter():
        memory = pair.wrapped.new_memory()
        memory.write(pair.text(CHUNK, seed=1))
        found = outer(input_ids=text, memory=memory).logits
    plain = BY_NAME["llama"].build(attn_implementation="eager")
    writer, reader = (merged(plain, pair.wrapped, adapter) for adapter in ("write", "read"))
    rows = oracle.write(writer, pair.text(CHUNK, seed=1), pair.begin, [b[:0] for b in pair.begin], mark=pair.mark, k=K)
    expected = oracle.read(reader, text, [torch.cat(both) for both in zip(pair.begin, rows, strict=True)])
    assert error(found, expected) < TOLERANCE
    assert {name for name, parameter in outer.named_parameters() if parameter.requires_grad} == trainable


# ---------------------------------------------------------------- options


def test_dropout_acts_in_training_only() -> None:
    model = stir(retrofit(BY_NAME["llama"], adapters={"rank": 2, "dropout": 0.5}, long_term_tokens=0).wrapped)
    memory, text = model.new_memory(), ids(1, 7)
    memory.write(ids(1, CHUNK)[0])
    assert torch.equal(model(text, memory=memory).logits, model(text, memory=memory).logits)
    model.train()
    assert error(model(text, memory=memory).logits, model(text, memory=memory).logits) > 1e-3


@pytest.mark.parametrize(
    ("family", "adapted"),
    [
        ("llama", "0: down_proj gate_proj k_proj o_proj q_proj up_proj v_proj"),
        ("gpt2", "0: c_attn c_fc c_proj"),
        ("phi3", "0: down_proj gate_up_proj o_proj qkv_proj"),
        ("mixtral", "0: k_proj o_proj q_proj v_proj"),
        ("deepseek-v3", "0: down_proj gate_proj kv_a_proj_with_mqa kv_b_proj o_proj q_a_proj q_b_proj up_proj"),
        ("deepseek-v3", "1: kv_a_proj_with_mqa kv_b_proj o_proj q_a_proj q_b_proj"),
        ("jamba", "0: "),
        ("jamba", "1: k_proj o_proj q_proj v_proj"),
        ("bloom", "0: dense dense_4h_to_h dense_h_to_4h query_key_value"),
    ],
)
def test_attention_and_dense_mlps_are_adapted_and_experts_are_not(family: str, adapted: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = retrofit(BY_NAME[family]).wrapped
    number, names = adapted.split(": ")
    layer = model.mplus_engine.retrofit.anatomy.layers[int(number)]
    assert {name.rpartition(".")[2] for name, module in layer.named_modules() if hasattr(module, "lora_A")} == set(
        names.split()
    )
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        peft.LoraConfig(target_modules=["q_proj"], use_dora=True),
    ],
    ids=["modules_to_save", "IA3", "DoRA"],
)
def test_other_kinds_of_adapters_stay_active(config: peft.PeftConfig) -> None:
    text, architecture = ids(1, 7), BY_NAME["llama"]
    outer = peft.get_peft_model(architecture.build(), config)
    with torch.no_grad():
        for parameter in outer.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.3).add_(0.01)
    before, kinds = outer(input_ids=text).logits, _kinds(outer)
    assert error(before, architecture.build()(text).logits) > 0.01
    mplus.wrap(outer, config_for(architecture))
    assert torch.equal(outer(input_ids=text).logits, before)
    stir(outer.get_base_model().mplus)
    memory = outer.get_base_model().new_memory()
    memory.write(ids(1, CHUNK)[0])
    outer(input_ids=text, memory=memory)
    assert torch.equal(outer(input_ids=text).logits, before)
    mplus.unwrap(outer)
    assert torch.equal(outer(input_ids=text).logits, before)
    assert _kinds(outer) == kinds


def test_target_modules_are_taken_by_name() -> None:
    model = retrofit(BY_NAME["llama"], adapters={"rank": 2, "target_modules": ["q_proj", "down_proj"]}).wrapped
    adapted = {name.split(".lora_")[0].split(".")[-1] for name in model.state_dict() if ".lora_" in name}
    assert adapted == {"q_proj", "down_proj"}


@pytest.mark.parametrize("targets", [["nothing"], ["embed_tokens"]])
def test_targets_that_are_no_projections_are_refused(targets: list[str]) -> None:
    base = BY_NAME["llama"].build()
    names = set(base.state_dict())
    with pytest.raises(ConfigError, match=targets[0]):
        mplus.wrap(base, config_for(BY_NAME["llama"], adapters={"rank": 2, "target_modules": targets}))
    assert set(base.state_dict()) == names
    assert not hasattr(base, "mplus_engine")


def test_no_adapters() -> None:
    pair = retrofit(BY_NAME["llama"], adapters=None, long_term_tokens=0)
    assert not any(".lora_" in name for name in pair.wrapped.state_dict())
    memory, text = pair.memory(chunks=1), pair.text(7)
    rows = [torch.cat([b, s.hidden]) for b, s in zip(pair.begin, memory.states[0].stm, strict=True)]
    assert error(pair.wrapped(text, memory=memory).logits, oracle.read(pair.plain, text, rows)) < TOLERANCE
