"""Streams under adapters of their own: in one batch, in files and in writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from benchmarks.quality.architectures.comparisons import TOLERANCE, error
from mplus.errors import MemoryMismatchError, NotSupported
from mplus.memory import Memory
from mplus.memory.transaction import Streams
from tests.hf.adapters.adapter_sets import (
    ASKED,
    TEXT,
    alone,
    decoder,
    edited,
    logits,
    wrapped,
    written,
)

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def model() -> Any:
    return wrapped()


# ---------------------------------------------------------------- an adapter for each row

NAMES = ["anna", "bert", "__base__"]


def under_each(model: Any, rows: str) -> Memory:
    """A memory of three streams, each written under an adapter of its own."""
    memory: Memory = model.new_memory(3, memory_rows=rows)
    for row, name in enumerate(NAMES):
        with alone(model, name):
            memory.write([TEXT[: 150 + 100 * row] if row == other else None for other in range(3)])
    model.set_adapter("anna")
    return memory


@pytest.mark.parametrize("rows", ["hidden", pytest.param("both", marks=pytest.mark.nightly), "projected"])
def test_each_row_is_as_its_adapter_alone(model: Any, rows: str) -> None:
    memory = under_each(model, rows)
    found = logits(model, memory, adapter_names=NAMES)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    ways: tuple[dict[str, Any], ...] = ({}, {"num_beams": 2}, {"retrieve_every": 2})
    said = [
        model.generate(input_ids=ASKED.expand(3, -1), memory=memory, adapter_names=NAMES, **options, **way)
        for way in ways
    ]
    for row, name in enumerate(NAMES):
        one = memory.select([row])
        with alone(model, name):
            assert float((logits(model, one)[0] - found[row]).abs().max()) <= 1e-5
            for way, texts in zip(ways, said, strict=True):
                assert torch.equal(model.generate(input_ids=ASKED, memory=one, **options, **way)[0], texts[row])


def test_a_row_kept_as_keys_and_values_is_refused_under_another_adapter(model: Any) -> None:
    memory = under_each(model, "projected")
    with pytest.raises(MemoryMismatchError, match=r"batch row 1.*made under adapters \['bert'\], now \['anna'\]"):
        logits(model, memory, adapter_names=["anna", "anna", "__base__"])
    with pytest.raises(MemoryMismatchError, match=r"batch row 1"):
        logits(model, memory)
    with (
        pytest.raises(NotSupported, match="set_adapter"),
        model.base_model._enable_peft_forward_hooks(adapter_names=NAMES),
    ):
        memory.write([TEXT, None, None])


def test_by_default_a_decoder_with_adapters_keeps_hidden_states(model: Any) -> None:
    """So that one memory can be read with any of them; the example of three rows works without further ado."""
    memory = model.new_memory(3)
    memory.write([TEXT] * 3)
    found = logits(model, memory, adapter_names=NAMES)
    for row, name in enumerate(NAMES):
        with alone(model, name):
            assert float((logits(model, memory.select([row]))[0] - found[row]).abs().max()) <= 1e-5
    assert wrapped(decoder()).new_memory().stores[0].layout.projected_size


# ---------------------------------------------------------------- files and writes


def test_a_saved_memory_under_other_adapters(model: Any, tmp_path: Path) -> None:
    found = {}
    for rows in ("hidden", "both", "projected"):
        memory = written(model, rows)
        memory.save(tmp_path / rows)
        found[rows] = logits(model, memory)
    model.set_adapter("bert")
    with pytest.raises(MemoryMismatchError, match=r"made under adapters \['anna'\], now \['bert'\]"):
        Memory.load(tmp_path / "projected", model)
    for rows in ("hidden", "both"):
        with pytest.warns(UserWarning, match=r"made under adapters \['anna'\], now \['bert'\].*projected anew"):
            memory = Memory.load(tmp_path / rows, model)
        fresh = model.new_memory(memory_rows="hidden")
        parts = fresh.streams
        fresh = Memory(Streams(parts.engine, memory.states, memory.stores, parts.generators, parts.eviction))
        assert error(logits(model, memory), logits(model, fresh)) <= TOLERANCE
        assert error(logits(model, memory), found[rows]) > 1e-3
    model.set_adapter("anna")
    for rows, before in found.items():
        assert torch.equal(logits(model, Memory.load(tmp_path / rows, model)), before)


def test_streams_of_several_adapters_are_saved_and_loaded(model: Any, tmp_path: Path) -> None:
    memory = under_each(model, "projected")
    found = logits(model, memory, adapter_names=NAMES)
    memory.save(tmp_path)
    assert torch.equal(logits(model, Memory.load(tmp_path, model), adapter_names=NAMES), found)


def test_a_memory_saved_after_its_weights_changed_is_not_taken_for_a_new_one(model: Any, tmp_path: Path) -> None:
    memory = written(model, "projected")
    with edited(model, "k_proj.base_layer.weight"):
        memory.save(tmp_path)
        with pytest.raises(MemoryMismatchError, match="weights of the base model have changed"):
            Memory.load(tmp_path, model)


def test_a_memory_in_a_directory(model: Any, tmp_path: Path) -> None:
    found = {}
    for rows in ("both", "projected"):
        with Memory.open(tmp_path / rows, model, memory_rows=rows) as memory:
            model.set_adapter("bert")
            memory.write(TEXT)  # nothing was written under anna, so this is no mixture
            found[rows] = logits(model, memory)
        with Memory.open(tmp_path / rows, model) as memory:
            assert torch.equal(logits(model, memory), found[rows])
        model.set_adapter("anna")
    with pytest.raises(MemoryMismatchError, match=r"made under adapters \['bert'\], now \['anna'\]"):
        Memory.open(tmp_path / "projected", model)
    with pytest.warns(UserWarning, match="projected anew"):
        reader = Memory.open(tmp_path / "both", model, read_only=True)
    with pytest.warns(UserWarning, match="projected anew"):
        writer = Memory.open(tmp_path / "both", model)
    with writer as memory:
        assert error(logits(model, reader), logits(model, memory)) <= TOLERANCE
        assert error(logits(model, memory), found["both"]) > 1e-3


def test_a_write_under_other_adapters(model: Any) -> None:
    for rows in ("hidden", "both"):
        memory = written(model, rows)
        model.set_adapter("bert")
        memory.write(TEXT[:64])
        logits(model, memory)
        model.set_adapter("anna")
        memory.write(TEXT[:64])
    memory = model.new_memory(2, memory_rows="projected")
    memory.write([TEXT, None])
    model.set_adapter("bert")
    memory.write([None, TEXT])
    with pytest.raises(MemoryMismatchError, match=r"batch row 0.*\['anna'\], now \['bert'\]"):
        memory.write([TEXT, None])
    memory.reset()
    memory.write([TEXT, TEXT])
    assert torch.isfinite(logits(model, memory)).all()
