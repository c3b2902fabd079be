"""Rows are read with the adapters and weights of now, whatever changed since they were written, or not at all."""

from __future__ import annotations

import contextlib
import warnings
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from peft.utils.hotswap import hotswap_adapter

from benchmarks.quality.architectures.comparisons import TOLERANCE, error
from mplus.errors import MemoryMismatchError
from mplus.hf.adapters.tensor_group import TensorGroup
from mplus.hf.model.static_reader import StaticReader
from mplus.hf.pretrained.shipped import load_decoder
from mplus.memory import Memory
from tests.hf.adapters.adapter_sets import (
    ASKED,
    QKV,
    TEXT,
    decoder,
    edited,
    logits,
    lora,
    moved,
    switched,
    with_two,
    wrapped,
    written,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def model() -> Any:
    return wrapped()


@pytest.fixture(scope="module")
def shared() -> Any:
    """A model whose tests take back every change, and say so."""
    return wrapped()


# ---------------------------------------------------------------- what may change


def layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(getattr(module, "scaling", None), dict)]


@contextlib.contextmanager
def both_active(model: Any) -> Iterator[None]:
    model.base_model.set_adapter(["anna", "bert"])
    yield
    model.set_adapter("anna")


@contextlib.contextmanager
def scaled(model: Any) -> Iterator[None]:
    for layer in (one for one in layers(model) if "anna" in one.scaling):
        layer.scaling["anna"] *= 3
    yield
    for layer in (one for one in layers(model) if "anna" in one.scaling):
        layer.scaling["anna"] /= 3


@contextlib.contextmanager
def scaled_by_peft(model: Any) -> Iterator[None]:
    own = [one for one in layers(model) if hasattr(one, "scale_layer")]
    for layer in own:
        layer.scale_layer(0.5)
    yield
    for layer in own:
        layer.unscale_layer()


@contextlib.contextmanager
def weighted(model: Any) -> Iterator[None]:
    model.add_weighted_adapter(["anna", "bert"], [0.5, 0.5], "sum", combination_type="linear")
    model.set_adapter("sum")
    yield
    model.set_adapter("anna")
    model.delete_adapter("sum")


@contextlib.contextmanager
def loaded(model: Any) -> Iterator[None]:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: -t if ".lora_A.anna" in name else t for name, t in state.items()})
    yield
    model.load_state_dict(state)


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "set_adapter": (switched, r"made under adapters \['anna'\], now \['bert'\]"),
    "two at once": (both_active, r"made under adapters \['anna'\], now \['anna', 'bert'\]"),
    "disable_adapter": (lambda model: model.disable_adapter(), r"made under adapters \['anna'\], now \[\]"),
    "add_weighted_adapter": (weighted, r"made under adapters \['anna'\], now \['sum'\]"),
    "scaling": (scaled, r"adapter 'anna' scaled by 2, now the scaling is 6"),
    "scale_layer": (scaled_by_peft, r"adapter 'anna' scaled by 2, now the scaling is 1"),
    "contents": (lambda model: edited(model, "k_proj.lora_A.anna"), r"\(contents\) of adapter 'anna' have changed"),
    "our adapter": (lambda model: edited(model, "v_proj.base_layer.lora_B.read"), "of adapter 'read' have changed"),
    "load_state_dict": (loaded, r"\(contents\) of adapter 'anna' have changed"),
    "base": (lambda model: edited(model, "k_proj.base_layer.weight"), "weights of the base model have changed"),
    "norm": (lambda model: edited(model, "input_layernorm.weight"), "weights of the base model have changed"),
    "retriever": (lambda model: edited(model, "mplus.retriever.key_proj"), "of the retriever have changed"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_rows_are_refused_or_computed_anew(shared: Any, name: str) -> None:
    model, (change, message) = shared, CHANGES[name]
    hidden, both, projected = (written(model, rows) for rows in ("hidden", "both", "projected"))
    before = logits(model, projected)
    kept = logits(model, both), logits(model, hidden)
    assert error(kept[1], before) <= TOLERANCE
    with change(model):
        for use in (lambda: logits(model, projected), lambda: projected.write(TEXT)):
            with pytest.raises(MemoryMismatchError, match=message):
                use()
        now = logits(model, hidden)
        assert error(now, kept[1]) > 1e-3, "nothing changed, so nothing was tested"
        assert error(logits(model, both), now) <= TOLERANCE
        fresh = written(model, "projected")
        assert torch.isfinite(logits(model, fresh)).all()
    assert torch.equal(logits(model, projected), before), "what it was made with is back"
    assert error(logits(model, both), kept[0]) <= TOLERANCE
    with pytest.raises(MemoryMismatchError):
        logits(model, fresh)


def test_an_adapter_that_is_exchanged_in_place_is_noticed(model: Any, tmp_path: Path) -> None:
    other = moved(with_two(), seed=8)
    other.save_pretrained(tmp_path)
    projected, hidden = written(model, "projected"), written(model, "hidden")
    before = logits(model, hidden)
    logits(model, projected)
    hotswap_adapter(model, str(tmp_path / "anna"), adapter_name="anna")
    assert error(logits(model, hidden), before) > 1e-3
    with pytest.raises(MemoryMismatchError, match=r"\(contents\) of adapter 'anna' have changed"):
        logits(model, projected)
    model.delete_adapter("bert")
    model.load_adapter(str(tmp_path / "bert"), adapter_name="bert")
    model.set_adapter("bert")
    with pytest.raises(MemoryMismatchError, match=r"now \['bert'\]"):
        logits(model, projected)


def test_what_does_not_act_on_rows_does_not_matter(model: Any, tmp_path: Path) -> None:
    projected = written(model, "projected")
    before = logits(model, projected)
    projected.save(tmp_path)
    model.add_adapter("third", lora(target_modules=["down_proj"]))
    model.add_adapter("idle", lora())
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    with edited(model, "k_proj.lora_A.bert"), edited(model, "lora_B.write"):
        assert torch.equal(logits(model, projected), before)
        assert torch.equal(logits(model, projected), before)
    model.base_model.set_adapter(["anna", "third"])
    assert torch.equal(logits(model, Memory.load(tmp_path, model)), before)
    projected.write(TEXT)


def test_what_a_sample_cannot_see_is_said(model: Any) -> None:
    projected = written(model, "projected")
    before = logits(model, projected)
    weight = model.get_parameter("base_model.model.model.layers.1.self_attn.k_proj.base_layer.weight")
    value = weight.data.view(-1)[1].clone()
    weight.data.view(-1)[1] += 0.5
    logits(model, projected)
    model.weights_changed()
    with pytest.raises(MemoryMismatchError, match="weights of the base model have changed"):
        logits(model, projected)
    weight.data.view(-1)[1] = value
    model.weights_changed()
    assert torch.equal(logits(model, projected), before)


# ---------------------------------------------------------------- adapters put on afterwards


KINDS: dict[str, peft.PeftConfig] = {
    "LoRA": lora(),
    "rsLoRA": lora(use_rslora=True),
    "DoRA": lora(use_dora=True),
    "IA3": peft.IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
    "VeRA": peft.VeraConfig(r=4, target_modules=["k_proj"], task_type="CAUSAL_LM"),
    "LoHa": peft.LoHaConfig(r=4, target_modules=QKV, task_type="CAUSAL_LM"),
    "OFT": peft.OFTConfig(oft_block_size=4, target_modules=["k_proj"], task_type="CAUSAL_LM"),
    "norms": peft.LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM"),
    "modules_to_save": lora(target_modules=["down_proj"], modules_to_save=["input_layernorm"]),
}


@pytest.mark.parametrize(
    ("first", "name"),
    [
        *(("wrapped first", name) for name in KINDS),
        *(("adapter first", name) for name in ("DoRA", "norms", "modules_to_save")),
    ],
)
def test_every_kind_of_adapter_projects_rows(name: str, first: str) -> None:
    base = decoder()
    if first == "wrapped first":
        plain = wrapped(base)
        stale = written(plain, "projected")
        logits(plain, stale)
        model = peft.get_peft_model(plain, KINDS[name])
    else:
        model = wrapped(peft.get_peft_model(base, KINDS[name]))
        with model.disable_adapter():
            stale = written(model, "projected")
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            if "default" in part:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.eval()
    with pytest.raises(MemoryMismatchError, match=r"made under adapters \[\], now \['default'\]"):
        logits(model, stale)
    engine = base.mplus_engine
    rows = torch.randn(1, 5, 64, generator=generator)
    for acts in (True, False):
        with contextlib.nullcontext() if acts else model.disable_adapter(), torch.no_grad():
            for index, layer in enumerate(base.model.layers):
                normed = layer.input_layernorm(rows)
                with without_ours(base):
                    expected = torch.cat([layer.self_attn.k_proj(normed), layer.self_attn.v_proj(normed)], -1)
                    assert error(engine.project(index, rows), expected) <= TOLERANCE
            kept = written(model, "projected")
            assert error(logits(model, kept), logits(model, written(model, "hidden"))) <= TOLERANCE


@contextlib.contextmanager
def without_ours(model: Any) -> Iterator[None]:
    """What ``layer.k_proj(...)`` gives outside of a pass is without the adapter for reading."""
    kept = {name: p.data.clone() for name, p in model.named_parameters() if ".lora_B.read." in name}
    for name in kept:
        model.get_parameter(name).data.zero_()
    yield
    for name, values in kept.items():
        model.get_parameter(name).data.copy_(values)


def test_with_transformers_own_methods() -> None:
    model = wrapped(decoder())
    stale = written(model, "projected")
    before = logits(model, stale)
    model.add_adapter(lora(), adapter_name="carl")
    moved(model, seed=4)
    model.disable_adapters()
    with without_change(model):
        fresh = written(model, "projected")
    model.enable_adapters()
    with pytest.raises(MemoryMismatchError, match=r"made under adapters \[\], now \['carl'\]"):
        logits(model, fresh)
    model.disable_adapters()
    assert torch.isfinite(logits(model, fresh)).all()
    assert before.shape == logits(model, fresh).shape


@contextlib.contextmanager
def without_change(model: Any) -> Iterator[None]:
    yield


# ---------------------------------------------------------------- caches


@torch.no_grad()
def test_a_cache_is_not_continued_with_other_adapters(shared: Any) -> None:
    model = shared
    for rows in ("hidden", "both"):
        memory = written(model, rows)
        cache = model(input_ids=ASKED, memory=memory, use_cache=True).past_key_values
        for tokens in (1, 3):
            for change in (switched, scaled, lambda m: m.disable_adapter()):
                with change(model), pytest.raises(MemoryMismatchError, match="cannot be continued"):
                    model(input_ids=ASKED[:, :tokens], memory=memory, past_key_values=cache)
        with edited(model, "k_proj.lora_A.anna"), pytest.raises(MemoryMismatchError, match="cannot be continued"):
            model.generate(
                input_ids=torch.cat([ASKED, ASKED], 1), memory=memory, past_key_values=cache, max_new_tokens=1
            )
        model(input_ids=ASKED[:, :1], memory=memory, past_key_values=cache)


def test_adapters_beside_attention_end_a_cache_too(model: Any) -> None:
    model.add_adapter("mlp", lora(target_modules=["down_proj"]))
    moved(model)
    memory = written(model, "projected")
    with torch.no_grad():
        cache = model(input_ids=ASKED, memory=memory, use_cache=True).past_key_values
        model.base_model.set_adapter(["anna", "mlp"])
        logits(model, memory)
        with pytest.raises(MemoryMismatchError, match=r"made under adapters \['anna'\], now \['anna', 'mlp'\]"):
            model(input_ids=ASKED[:, :1], memory=memory, past_key_values=cache)


def test_nothing_is_looked_at_for_a_token(shared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    mark = TensorGroup.mark

    def count(self: TensorGroup, moment: object = None) -> Any:
        looked.append(len(self.named))
        return mark(self, moment)

    monkeypatch.setattr(TensorGroup, "mark", count)
    model = shared
    memory = written(model, "projected")
    found = []
    for tokens in (1, 9):
        looked.clear()
        model.generate(input_ids=ASKED, memory=memory, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
        found.append(sum(looked))
    assert found[0] == found[1] > 0
    with torch.no_grad():
        cache = model(input_ids=ASKED, memory=memory, use_cache=True).past_key_values
        looked.clear()
        for _ in range(3):
            model(input_ids=ASKED[:, :1], memory=memory, past_key_values=cache)
    assert looked == []


# ---------------------------------------------------------------- what else is made from weights


def test_keys_that_come_from_attention_follow_its_adapters() -> None:
    model = wrapped(retriever={"name": "attention"})
    memory = written(model, "hidden")
    version, store = memory.version, memory.stores[0]
    with switched(model):
        logits(model, memory)
        assert memory.version == version + 1
        for layer in range(2):
            stored = memory.stores[0].gather(layer, memory.stores[0].ids(layer))
            assert torch.equal(stored.key, model.mplus_engine.keys(layer, stored.need_hidden()))
    assert store is memory.stores[0]


def test_a_static_reader_notices_what_it_has_copied() -> None:
    model = wrapped(decoder())
    memory, reader = written(model, "projected"), StaticReader(model)
    reader.prefill(ASKED, memory=memory, room=2)
    for part in ("down_proj.lora_B.read", "up_proj.weight"):
        with edited(model, part), pytest.raises(MemoryMismatchError, match="make another"):
            reader.prefill(ASKED, memory=memory, room=2)
    reader.prefill(ASKED, memory=memory, room=2)
    outer = peft.get_peft_model(model, lora(target_modules=["down_proj"]))
    with pytest.raises(MemoryMismatchError, match="default"):
        reader.prefill(ASKED, memory=memory, room=2)
    with outer.disable_adapter():
        reader.prefill(ASKED, memory=memory, room=2)


def test_another_begin_row_is_read_at_once(shared: Any) -> None:
    model = shared
    memory = written(model, "projected")
    before = logits(model, memory)
    with edited(model, "mplus.begin", -2.0):
        assert error(logits(model, memory), before) > 1e-3
    assert torch.equal(logits(model, memory), before)


def test_a_trained_decoder_in_bfloat16() -> None:
    model = wrapped(with_two(load_decoder()).to(torch.bfloat16))
    both, projected = written(model, "both"), written(model, "projected")
    before = logits(model, projected)
    assert torch.equal(logits(model, both), before)
    with switched(model):
        with pytest.raises(MemoryMismatchError, match=r"now \['bert'\]"):
            logits(model, projected)
        after = logits(model, both)
        for layer, rows in enumerate(both.states[0].stm):
            anew = model.mplus_engine.project(layer, rows.need_hidden()[None])[0]
            assert torch.equal(rows.projected, anew)
        assert not torch.equal(after, before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(logits(model, projected), before)
