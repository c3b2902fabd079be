"""A budget in bytes: what it is made of, and that no memory at rest takes more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mplus
from mplus.config import byte_count
from mplus.errors import ConfigError
from mplus.memory.format.manifest import read_manifest
from mplus.stores import STORES
from mplus.stores.ram import RamStore
from tests.memory import tiny
from tests.memory.counting import LAYERS, CountedModel, counting_memory
from tests.memory.tiny import rows_bytes

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (12345, 12345),
        ("12345", 12345),
        ("1B", 1),
        ("512MiB", 512 * 2**20),
        ("8 GiB", 8 * 2**30),
        ("1.5GB", 1_500_000_000),
        (" 2.25 KiB ", 2304),
        ("3kB", 3000),
        ("3KB", 3000),
        ("0.1TB", 100_000_000_000),  # not 99,999,999,999: no floating point on the way
    ],
)
def test_bytes_are_read(text: Any, count: int) -> None:
    assert byte_count(text) == count
    assert mplus.MPlusConfig(bytes_budget=text).bytes_budget == text


@pytest.mark.parametrize("text", [0, -5, True, 1.5, "", "GiB", "8 gib", "1e9", "-1GB", "0 MB", "0.2B", "1.5.2GB", [8]])
def test_what_is_no_number_of_bytes_is_refused(text: Any) -> None:
    with pytest.raises(ConfigError, match=r"bytes_budget must be .*'8GiB', got") as caught:
        mplus.MPlusConfig(bytes_budget=text)
    assert repr(text) in str(caught.value)


def config_of(budget: Any, **changes: Any) -> dict[str, Any]:
    sizes = {"memory_tokens_per_chunk": 2, "short_term_tokens": 6, "retrieved_tokens": 1, "long_term_tokens": 3}
    return {**sizes, "bytes_budget": budget, **changes}


def room(rows: int) -> int:
    """Bytes of a layer's long-term rows and of the room between them: an eighth of it, two rows at least."""
    return (rows + max(2, rows // 8)) * STORED


ROW = 4 * 4 + 8 + 8  # hidden state of width 4, birth and source
STORED = ROW + 2 * 4 + 8  # a key of width 2, and the id
TAIL = -(-4 * 8 // LAYERS) * LAYERS  # the ids of a chunk, which may wait; every layer's share is rounded up
FIXED = 6 * ROW * LAYERS + TAIL


def test_the_capacity_is_what_short_term_memory_leaves() -> None:
    memory = counting_memory(**config_of(FIXED + room(11) * LAYERS + STORED * LAYERS - 1))
    assert (memory.capacity, memory.text_capacity) == (11, 11 * 8 // 2)
    assert memory.streams.budget.bytes == FIXED + (13 + 1) * STORED * LAYERS - 1
    assert "at most 11 LTM (44 text tokens)" in repr(memory)
    memory.write([7] * 200)
    assert [memory.stores[0].count(layer) for layer in range(LAYERS)] == [11] * LAYERS
    assert rows_bytes(memory) == FIXED - TAIL + 11 * STORED * LAYERS
    two = counting_memory(2, **config_of(2 * (FIXED + room(100) * LAYERS)))
    assert two.capacity == 100
    assert counting_memory(2, **config_of(2 * (FIXED + room(100) * LAYERS) - 1)).capacity == 99


def test_rows_that_wait_and_lifetimes_are_reckoned_with() -> None:
    waiting = {"mechanism": {"name": "mplus", "merge_every": 3}, "eviction": "ttl"}
    pending, expiring = (ROW + 8) * LAYERS, (STORED + 8) * LAYERS
    memory = counting_memory(**config_of(FIXED + 6 * pending + (5 + 2) * expiring, **waiting))
    assert memory.capacity == 5


def test_a_budget_takes_the_place_of_long_term_tokens() -> None:
    assert counting_memory(**config_of(None)).capacity == 3
    assert counting_memory(**config_of(None, long_term_tokens=None)).text_capacity is None
    assert counting_memory(**config_of("1MiB")).capacity > 3
    for none in ({"long_term_tokens": 0}, {"mechanism": "memoryllm"}):
        memory = counting_memory(**config_of("1MiB", **none))
        memory.write([7] * 100)
        assert (memory.capacity, memory.stores[0].count(0)) == (0, 0)


@pytest.mark.parametrize("streams", [1, 2])
def test_too_small_a_budget_says_what_it_takes(streams: int) -> None:
    least = streams * (FIXED + room(2) * LAYERS)
    assert counting_memory(streams, **config_of(least)).capacity == 2
    with pytest.raises(ConfigError, match=rf"bytes_budget must be at least {least:,} bytes for {streams} .* got"):
        counting_memory(streams, **config_of(least - 1))


@settings(max_examples=30)
@given(
    rows=st.integers(2, 60),
    spare=st.integers(0, STORED * LAYERS - 1),
    writes=st.lists(st.tuples(st.integers(1, 60), st.integers(0, 60)), min_size=1, max_size=5),
    changes=st.sampled_from(
        [
            {},
            {"mechanism": {"name": "mplus", "merge_every": 2}},
            {"mechanism": {"name": "mplus", "merge_every": 3, "lifetime": 4.0}, "variant": "published"},
            {"eviction": "reservoir"},
            {"eviction": "lru", "drop_per_layer": False},
            {"store": "quantized"},
            {"store": {"name": "quantized", "keys": False}, "eviction": "reservoir"},
            {"store": {"name": "ram", "slab_rows": 3, "growth": 1.3}, "eviction": "reservoir"},
        ]
    ),
    forget=st.booleans(),
)
def test_a_memory_never_takes_more_than_the_budget(
    rows: int, spare: int, writes: list[tuple[int, int]], changes: dict[str, Any], forget: bool
) -> None:
    budget = 2 * (FIXED + 6 * ROW * LAYERS * 2 + room(rows) * LAYERS + spare)
    memory = counting_memory(2, **config_of(budget, **changes))
    for number, (one, other) in enumerate(writes):
        memory.write([[7] * one, [7] * other if other else None], source=f"{number % 2}")
        assert rows_bytes(memory) <= memory.nbytes <= budget
        if forget and number == 3:
            memory.forget("1")
            assert memory.nbytes <= budget
    fork = memory.fork()
    fork.write([[7] * 30, [7] * 30])
    assert max(memory.nbytes, fork.nbytes) <= budget


@pytest.mark.parametrize(
    ("store", "eviction"),
    [
        ("ram", "fifo"),
        pytest.param("ram", "reservoir", marks=pytest.mark.nightly),
        pytest.param("quantized", "fifo", marks=pytest.mark.nightly),
        ("quantized", "reservoir"),
    ],
)
def test_at_capacity_the_room_reserved_is_inside_the_budget(store: str, eviction: str) -> None:
    budget = 150_000
    memory = counting_memory(**config_of(budget, store=store, eviction=eviction))
    capacity = memory.capacity or 0
    while memory.stores[0].count(0) < capacity:
        memory.write([7] * 160)
        assert memory.nbytes <= budget
    for _ in range(10):
        memory.write([7] * 160)
        assert memory.nbytes <= budget
    assert memory.stores[0].count(0) == capacity
    assert rows_bytes(memory) > 0.8 * budget, "most of it is rows"


def test_a_loaded_memory_keeps_to_another_budget_at_once(tmp_path: Path) -> None:
    memory = counting_memory(**config_of("100kB"))
    memory.write([7] * 1000)
    memory.save(tmp_path)
    loaded = mplus.Memory.load(tmp_path, CountedModel(memory.engine), bytes_budget=memory.nbytes + 10_000)
    assert loaded.nbytes <= memory.nbytes + 10_000


def test_projected_rows_have_hidden_states_kept_beside_them() -> None:
    model = tiny.build(memory_rows="projected")
    budget = 60_000
    memory = model.new_memory(bytes_budget=budget)
    memory.write(tiny.ids(16 * 30))
    layout = memory.stores[0].layout
    taken = rows_bytes(memory)
    assert memory.stores[0].count(0) == memory.capacity
    rows = memory.stores[0].count(0)
    assert taken + 3 * (rows // 8) * (layout.row_bytes + 8) <= budget
    assert taken + 3 * (1 + (rows + 1) // 8) * (layout.row_bytes + 8) > budget


def test_a_store_says_what_its_rows_take() -> None:
    class Half(RamStore):
        name = "half"

        @property
        def bytes_per_row(self) -> int:
            return (self.layout.row_bytes + 8) // 2

    STORES.register("half", Half)
    try:
        budget = FIXED + room(20) // 2 * LAYERS
        assert counting_memory(**config_of(budget, store="half")).capacity == 20
    finally:
        STORES.unregister("half")
    codes = 4 + 2 + 2 * 2 + 8 + 8 + 8  # a byte for each number of hidden state and key, an exponent for each, and facts
    memory = counting_memory(**config_of(FIXED + (10 + 2) * codes * LAYERS, store="quantized"))
    assert memory.capacity == 10
    memory.write([7] * 200)
    assert rows_bytes(memory) == FIXED - TAIL + 10 * codes * LAYERS


def test_a_budget_is_saved_and_can_be_another_when_loaded(tmp_path: Path) -> None:
    model = tiny.variant("paper")
    memory = model.new_memory(bytes_budget="60kB", tokenizer=None)
    memory.write(tiny.ids(16 * 30))
    memory.save(tmp_path)
    manifest = read_manifest(tmp_path)
    assert (manifest.bytes_budget, manifest.capacity) == (60_000, memory.capacity)
    assert manifest.text_capacity == memory.text_capacity
    again = mplus.Memory.load(tmp_path, model)
    assert again.streams.budget == memory.streams.budget
    assert again.fork().streams.budget == again.select([0, 0]).streams.budget == memory.streams.budget
    other = mplus.Memory.load(tmp_path, model, bytes_budget=40_000)
    assert other.capacity is not None
    assert memory.capacity is not None
    assert other.capacity < memory.capacity
    other.write(tiny.ids(16))
    assert rows_bytes(other) <= 40_000
    wide = again.to(dtype=torch.float64)
    assert wide.capacity is not None
    assert wide.capacity < memory.capacity, "wider rows take more of the same budget"
    tiny.written("paper", [16]).save(tmp_path / "none")
    assert read_manifest(tmp_path / "none").bytes_budget is None
    assert mplus.Memory.load(tmp_path / "none", model).capacity == tiny.CAPACITY
