"""Mechanisms with parameters of their own, and lists of rows that are not one for every layer, have the same life."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
from attrs import evolve
from safetensors.torch import load_file

import mplus
from mplus.errors import ConfigError, MechanismError, MemoryMismatchError
from mplus.hf.decoders.train_model import choose_trained
from mplus.hf.pretrained.shipped import load_decoder
from mplus.mechanisms import MECHANISMS, StoreLayout
from mplus.memory.format.repair import repair
from mplus.memory.format.verify import verify
from mplus.memory.writing.update import Update
from mplus.testing.mechanisms import MechanismConformance
from mplus.training.decoder import make_streams
from tests.mechanisms.layer_bank import LayerBankMechanism
from tests.mechanisms.soft_prompt import SoftPromptMechanism
from tests.memory.tiny import rows_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor


class CountedMechanism(SoftPromptMechanism):
    """Keeps with every vector how many tokens its chunk had, and their mean and largest id."""

    name = "counted"

    def layout(self, shape: Any, kept: Any, projected_size: int) -> StoreLayout:
        extra = (("tokens", (), torch.int32), ("ids_seen", (2,), torch.float32))
        return evolve(super().layout(shape, kept, projected_size), extra=extra)

    def further(self, ids: Tensor) -> dict[str, Tensor]:
        seen = torch.stack([ids.float().mean(), ids.float().max()])
        return {"tokens": torch.tensor([len(ids)], dtype=torch.int32), "ids_seen": seen[None]}


CHUNK = 16
EACH = (SoftPromptMechanism, LayerBankMechanism, CountedMechanism)


class TestSoftPrompt(MechanismConformance):
    implementation = SoftPromptMechanism


class TestLayerBank(MechanismConformance):
    implementation = LayerBankMechanism
    settings: ClassVar[dict[str, int]] = {"retrieved_tokens": 200}


class TestCounted(MechanismConformance):
    implementation = CountedMechanism


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    for one in EACH:
        MECHANISMS.register(one.name, one)
    yield
    for one in EACH:
        MECHANISMS.unregister(one.name)


def wrapped(mechanism: Any, decoder: Any = None, **config: Any) -> Any:
    sizes = {"chunk_tokens": CHUNK, "min_chunk_tokens": 4, "long_term_tokens": 40, "retrieved_tokens": 32}
    sizes |= {"memory_tokens_per_chunk": 1, "short_term_tokens": 1, "adapters": None}
    torch.manual_seed(0)
    model = mplus.wrap(load_decoder() if decoder is None else decoder, {**sizes, "mechanism": mechanism.name, **config})
    with torch.no_grad():
        for parameter in model.mplus.parameters():
            parameter.add_(torch.randn_like(parameter) / 4)
    return model


@pytest.fixture(scope="module", params=EACH, ids=lambda one: one.name)
def model(request: Any, registered: None) -> Any:
    return wrapped(request.param)


def ids(tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 512, (tokens,), generator=torch.Generator().manual_seed(seed))


def written(model: Any, chunks: int = 3) -> mplus.Memory:
    memory: mplus.Memory = model.new_memory(seed=1)
    for turn in range(chunks):
        memory.write(ids(CHUNK, turn), source=f"s{turn}")
    return memory


@torch.no_grad()
def logits(model: Any, memory: Any = None) -> Tensor:
    found: Tensor = model(ids(9, 90)[None], memory=memory).logits
    return found


def test_a_stream_has_one_list_of_rows(model: Any) -> None:
    memory, shape = written(model), model.mplus_engine.decoder.shape
    layout = memory.stores[0].layout
    assert (layout.layers, shape.layers) == (1, 5)
    expected = 3 if layout.keeps_hidden else 3 * CHUNK
    assert memory.stores[0].count(0) == min(expected, 40 // CHUNK * CHUNK)
    assert "GiB" not in repr(memory)


def test_a_list_is_projected_by_the_layer_it_is_of(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = model.mplus_engine
    hidden = torch.randn(1, 4, engine.shape.width)
    monkeypatch.setattr(type(engine.mechanism), "layer_of", lambda self, part: part + 3)
    assert torch.equal(engine.project(0, hidden), engine.decoder.project(3, hidden))
    assert not torch.equal(engine.project(0, hidden), engine.decoder.project(0, hidden))


def test_its_parameters_are_saved_and_loaded(model: Any, tmp_path: Path) -> None:
    memory = written(model)
    memory.save(tmp_path / "memory")
    model.save_pretrained(tmp_path / "model", save_base=True)
    names = {f"mplus.{name}" for name, _ in model.mplus.named_parameters()}
    assert load_file(tmp_path / "model/model.safetensors").keys() == names
    assert "1 parameters" not in (tmp_path / "model/README.md").read_text()
    loaded = mplus.from_pretrained(tmp_path / "model")
    again = mplus.Memory.load(tmp_path / "memory", loaded)
    assert torch.equal(logits(loaded, again), logits(model, memory))
    with torch.no_grad():
        next(loaded.mplus.parameters()).add_(1)
    with pytest.raises(MemoryMismatchError, match="additions is"):
        mplus.Memory.load(tmp_path / "memory", loaded)


def test_unwrap_takes_them_off(model: Any) -> None:
    other = wrapped(type(model.mplus_engine.mechanism))
    plain = mplus.unwrap(other)
    assert not [name for name, _ in plain.named_parameters() if "mplus" in name]
    assert torch.equal(plain(ids(9, 90)[None]).logits, load_decoder()(ids(9, 90)[None]).logits)


def test_they_are_trained_by_every_way_a_gradient_has(model: Any) -> None:
    trained = choose_trained(model, "adapters")
    assert {name.partition(".")[0] for name in trained} == {"mplus"}
    streams = make_streams(model.mplus_engine, [0, 1], seed=0)
    losses = []
    for turn in range(2):
        streams.write(torch.stack([ids(CHUNK, turn), ids(CHUNK, 10 + turn)]), torch.tensor([turn, turn]))
        texts = torch.stack([ids(9, 90), ids(9, 91)])[:, None]
        losses.append(streams.read(texts).logits.square().mean())
    sum(losses).backward()
    assert all(bool(parameter.grad.abs().sum() > 0) for parameter in trained.values())
    model.zero_grad()
    model.requires_grad_(True)


def test_a_budget_counts_its_rows(model: Any) -> None:
    memory = model.new_memory(bytes_budget="64KiB")
    assert memory.text_capacity == model.mplus_engine.mechanism.capacity(memory.capacity)
    for turn in range(memory.text_capacity // CHUNK + 3):
        memory.write(ids(CHUNK, turn))
    assert memory.stores[0].count(0) <= memory.capacity
    assert rows_bytes(memory) <= 64 * 1024
    assert f"{memory.text_capacity} text tokens" in repr(memory)


@pytest.mark.parametrize("store", ["mmap", "tiered", "quantized"])
def test_other_stores_hold_them(store: str, model: Any, tmp_path: Path) -> None:
    memory, expected = model.new_memory(store=store), written(model)
    for turn in range(3):
        memory.write(ids(CHUNK, turn), source=f"s{turn}")
    if store == "quantized":
        assert memory.stores[0].count(0) == expected.stores[0].count(0)
        return
    assert torch.equal(logits(model, memory), logits(model, expected))
    with mplus.Memory.open(tmp_path / "live", model, store=store, seed=1) as live:
        for turn in range(3):
            live.write(ids(CHUNK, turn), source=f"s{turn}")
        assert torch.equal(logits(model, live), logits(model, expected))


WRONG = {
    "too many lists": (lambda update: Update(update.hidden * 2, update.projected * 2), "1 layers of its layout"),
    "too wide": (lambda update: _changed(update, lambda rows: torch.cat([rows, rows], 2)), "as floating"),
    "too many streams": (lambda update: _changed(update, lambda rows: torch.cat([rows, rows])), "as floating"),
}


def _changed(update: Update, change: Any) -> Update:
    return Update(*(tuple(map(change, lists)) for lists in (update.hidden, update.projected)))


@pytest.mark.parametrize("what", WRONG)
def test_rows_that_do_not_fit_its_layout_are_refused(what: str, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    change, message = WRONG[what]
    memory, before = written(model, 1), logits(model, written(model, 1))
    mechanism = type(model.mplus_engine.mechanism)
    write = mechanism.write
    monkeypatch.setattr(mechanism, "write", lambda *given: change(write(*given)))
    with pytest.raises(MechanismError, match=f"the mechanism '{mechanism.name}'.*{message}"):
        memory.write(ids(CHUNK, 5))
    monkeypatch.undo()
    assert torch.equal(logits(model, memory), before)


@pytest.mark.parametrize("store", ["ram", "mmap", "tiered", "quantized"])
def test_further_columns_are_kept_everywhere(store: str, tmp_path: Path) -> None:
    model = wrapped(CountedMechanism)
    with mplus.Memory.open(tmp_path / "live", model, store=store) as memory:
        memory.write(ids(CHUNK, 0), source="first")
        memory.checkpoint()
        memory.write(ids(7, 1), source="second")
        memory.write(ids(9, 2), source="third")
        memory.forget("second")
    with mplus.Memory.open(tmp_path / "live", model) as memory:
        memory.save(tmp_path / "saved")
    assert repair(tmp_path / "live", tmp_path / "mended") == verify(tmp_path / "live") == []
    for folder in ("saved", "mended"):
        assert verify(tmp_path / folder) == []
        [kept] = mplus.Memory.load(tmp_path / folder, model, store=store).stores
        rows = kept.gather(0, kept.ids(0))
        assert rows.extra["tokens"].tolist() == [CHUNK, 9]
        assert rows.extra["ids_seen"][:, 1].tolist() == [float(ids(CHUNK, 0).max()), float(ids(9, 2).max())]


def test_a_further_column_cannot_take_the_name_of_another() -> None:
    for name in ("hidden", "id", "two words"):
        with pytest.raises(ConfigError, match=f"extra columns of a StoreLayout must have names .*got '{name}'"):
            StoreLayout(layers=1, hidden_size=1, extra=((name, (), torch.int32),))


def test_embeddings_narrower_than_layers() -> None:
    from benchmarks.quality.architectures.decoders import BY_NAME

    model = wrapped(SoftPromptMechanism, BY_NAME["opt-post-norm"].build(0))
    memory = model.new_memory()
    for turn in range(2):
        memory.write(ids(CHUNK, turn) % 60)
    assert memory.stores[0].layout.hidden_size == model.get_input_embeddings().weight.shape[1] == 24
    with torch.no_grad():
        assert not torch.equal(model(ids(9)[None] % 60, memory=memory).logits, model(ids(9)[None] % 60).logits)


def test_what_build_returns_must_be_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LayerBankMechanism, "build", classmethod(lambda cls, *given: {}))
    with pytest.raises(MechanismError, match=r"'layer_bank': build must return a torch.nn.Module, got dict"):
        wrapped(LayerBankMechanism)
