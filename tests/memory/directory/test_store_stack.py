"""Directories whose store is more than mapped files: quantised rows, tiers above them, both."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch

from mplus.config import Component
from mplus.errors import InputError, MemoryMismatchError, UnknownNameError
from mplus.memory import Memory
from mplus.memory.directory.checkpoint_manifest import read_live_manifest
from mplus.memory.format.repair import repair
from mplus.memory.format.verify import verify
from mplus.stores import STORES
from mplus.stores.base import StoreLayout
from mplus.stores.disk.block_file import BlockFile
from mplus.stores.mmap import MmapStore, mapped_store
from mplus.stores.quantized import QuantizedStore
from mplus.stores.ram import RamStore
from mplus.stores.stack import saved_stack, stack_of
from mplus.stores.tiered import TieredStore
from tests.fixtures import make_live_v2_int8
from tests.fixtures.make_live_v1 import write
from tests.fixtures.make_memory_v1 import build_model, text
from tests.memory import tiny
from tests.memory.disks.plain import TIERS, PlainModel, chunk, reopened
from tests.memory.tiny import assert_same, content, difference

if TYPE_CHECKING:
    from pathlib import Path


QUANTIZED = {"name": "quantized", "group": 2}
KINDS: dict[str, Any] = {
    "quantized": QUANTIZED,
    "fp8, keys whole": {"name": "quantized", "format": "fp8", "keys": False},
    "tiered": TIERS,
    "quantized in tiers": {**QUANTIZED, "inner": TIERS},
    "tiers of quantized": {**TIERS, "inner": QUANTIZED},
}


def written(memory: Memory, first: int, last: int) -> None:
    for number in range(first, last):
        memory.write(chunk(number), source=f"{number % 3}")


def killed(memory: Memory) -> None:
    memory.directory.close()


@pytest.mark.parametrize("store", KINDS.values(), ids=KINDS)
def test_they_hold_what_ordinary_memories_of_that_store_hold(tmp_path, store):
    model = PlainModel(store=store, long_term_tokens=40)
    ordinary, memory = model.new_memory(), Memory.open(tmp_path / "memory", model)
    for one in (ordinary, memory):
        written(one, 0, 9)
    assert_same(memory, ordinary)
    killed(memory)
    for again in range(3):
        memory = Memory.open(tmp_path / "memory", model)
        assert type(memory.stores[0]) is STORES.get(store["name"])
        assert_same(memory, ordinary)
        for one in (ordinary, memory):
            written(one, 9 + 6 * again, 15 + 6 * again)
            one.forget(f"{again}")
        if again == 1:
            memory.checkpoint()
        assert_same(memory, ordinary)
        assert_same(reopened(tmp_path / "memory", model), ordinary)
        killed(memory) if again else memory.close()
    assert verify(tmp_path / "memory") == []
    assert repair(tmp_path / "memory", tmp_path / "repaired") == []
    assert_same(Memory.load(tmp_path / "repaired", model), ordinary)


def test_files_hold_codes_and_the_manifest_says_how(tmp_path):
    model = PlainModel(store={"name": "quantized", "inner": TIERS})
    with Memory.open(tmp_path, model) as memory:
        written(memory, 0, 9)
    manifest = read_live_manifest(tmp_path)
    expected = {"name": "quantized", "format": "int8", "group": 64, "keys": True, "inner": "mmap"}
    assert manifest.store == expected, "all options are written out, and nothing of tiers"
    rows = 0
    for entry in manifest.stores[0].files:
        file = BlockFile(tmp_path / entry.file, entry)
        dtypes = {name: file.span(f"0.{name}").dtype for name in ("hidden", "hidden_exponent", "key")}
        assert dtypes == {"hidden": torch.int8, "hidden_exponent": torch.int16, "key": torch.int8}
        rows += file.rows("0.id")
    assert rows >= memory.stores[0].count(0) > 0


def test_coding_stays_and_tiers_follow_the_config(tmp_path):
    quantized, whole = PlainModel(store=QUANTIZED), PlainModel()
    in_tiers, others = PlainModel(store=TIERS), PlainModel(store={**QUANTIZED, "group": 3, "inner": TIERS})
    ordinary = quantized.new_memory()
    written(ordinary, 0, 9)
    with Memory.open(tmp_path, quantized) as memory:
        written(memory, 0, 9)
    kinds = {"quantized": QuantizedStore, "whole": QuantizedStore, "tiers": TieredStore, "others": TieredStore}
    number = 9
    for model, kind in zip((quantized, whole, in_tiers, others), kinds.values(), strict=True):
        with Memory.open(tmp_path, model) as memory:
            assert type(memory.stores[0]) is kind
            for one in (memory, ordinary):
                written(one, number, number + 3)
            assert_same(memory, ordinary)
        number += 3
        assert read_live_manifest(tmp_path).store["group"] == 2
    with Memory.open(tmp_path / "whole", whole) as memory:
        written(memory, 0, 9)
        held = content(memory)
    with Memory.open(tmp_path / "whole", quantized) as memory:
        assert type(memory.stores[0]) is MmapStore
        assert difference(content(memory), held) == []


def test_an_old_directory_of_codes_is_read_and_goes_on(tmp_path):
    """A number is its code times two to the power of the exponent of its eight."""
    path, model = shutil.copytree(make_live_v2_int8.FOLDER, tmp_path / "old"), build_model()
    assert verify(path) == []
    manifest, old = read_live_manifest(path), Memory.open(path, model)
    compared = 0
    for store, entry in zip(old.stores, manifest.stores, strict=True):
        for file in (BlockFile(path / part.file, part) for part in entry.files):
            for layer in range(store.layout.layers):
                ids = file.read(f"{layer}.id")
                there = torch.isin(ids, store.ids(layer))
                rows = store.gather(layer, ids[there]).columns()
                for name in rows.keys() & {"hidden", "projected", "key"}:
                    codes = file.read(f"{layer}.{name}")[there].double()
                    scales = 2.0 ** file.read(f"{layer}.{name}_exponent")[there].double()
                    expected = codes * scales.repeat_interleave(8, 1)[:, : codes.shape[1]]
                    assert torch.equal(rows[name].double(), expected)
                    compared += codes.numel()
    assert compared > 500
    assert old.directory.journal_bytes > 0
    ordinary = model.new_memory(batch_size=2, seed=3, store=make_live_v2_int8.STORE)
    write(ordinary)
    found = content(old)
    for name, value in content(ordinary).items():
        if isinstance(value, torch.Tensor):  # computed by other kernels: a code may be the next one
            torch.testing.assert_close(found[name], value, rtol=0, atol=0.05, msg=name)
    old.write([text(20, 9), text(20, 10)])
    old.close()
    assert_same(Memory.open(path, model, read_only=True), old)


@pytest.mark.parametrize("name", ["hidden", "hidden_exponent", "key_exponent"])
def test_damage_is_found_and_the_rest_saved(tmp_path, name):
    model = PlainModel(store=QUANTIZED)
    with Memory.open(tmp_path / "memory", model) as memory:
        written(memory, 0, 9)
        before = content(memory)
    entry = read_live_manifest(tmp_path / "memory").stores[0].files[0]
    path = tmp_path / "memory" / entry.file
    data = bytearray(path.read_bytes())
    behind_header = 8 + int.from_bytes(data[:8], "little")
    data[behind_header + BlockFile(path, entry).span(f"0.{name}").begin] ^= 1
    path.write_bytes(data)
    assert any(f"0.{name}" in fault for fault in verify(tmp_path / "memory"))
    assert repair(tmp_path / "memory", tmp_path / "repaired") != []
    left = content(Memory.load(tmp_path / "repaired", model))
    assert set(difference(left, before)) == {f"0.ltm.0.{column}" for column in ("birth", "source", "hidden", "key")}


def test_a_store_that_is_not_there_is_named(tmp_path):
    class Mirrored(QuantizedStore):
        name = "mirrored"

    STORES.register("mirrored", Mirrored)
    model = PlainModel(store="mirrored")
    try:
        Memory.open(tmp_path, model).close()
    finally:
        STORES.unregister("mirrored")
    with pytest.raises(UnknownNameError, match="'mirrored'"):
        Memory.open(tmp_path, PlainModel())
    assert "'mirrored'" in verify(tmp_path)[0]


def test_another_device_needs_tiers(tmp_path):
    model, device = PlainModel(store=TIERS), torch.device("cpu")
    for number in range(2):
        with Memory.open(tmp_path / "memory", model, device=device) as memory:
            written(memory, 5 * number, 5 * number + 5)
            assert memory.device == device
    ordinary = model.new_memory()
    written(ordinary, 0, 10)
    assert_same(reopened(tmp_path / "memory", model), ordinary)


@pytest.mark.parametrize("store", ["ram", QUANTIZED, TIERS])
def test_the_meta_device_is_refused(tmp_path, store):
    """Its tensors have no values; whether the directory is there already or not."""
    model = PlainModel(store=store)
    with pytest.raises(InputError, match="meta device"):
        Memory.open(tmp_path / "new", model, device="meta")
    assert not (tmp_path / "new").exists()
    with Memory.open(tmp_path / "memory", model) as memory:
        written(memory, 0, 5)
        memory.save(tmp_path / "saved")
    with pytest.raises(InputError, match="meta device"):
        Memory.open(tmp_path / "memory", model, device="meta")
    with pytest.raises(InputError, match="meta device"):
        Memory.load(tmp_path / "saved", model, device="meta")


class TestKinds:
    @pytest.mark.parametrize(
        ("wanted", "kept", "expected"),
        [
            ("ram", None, "mmap"),
            ({"name": "ram", "slab_rows": 8}, None, "mmap"),
            ({"name": "mmap", "bytes_in_memory": 5}, None, "mmap"),
            (TIERS, "mmap", {**TIERS, "small_share": 0.5, "inner": "mmap"}),
            ("quantized", "mmap", "mmap"),
        ],
    )
    def test_files_are_innermost(self, wanted, kept, expected):
        found = stack_of(Component.of(wanted), None if kept is None else Component.of(kept))
        assert found == Component.of(expected)

    def test_what_is_kept_is_in_front_of_what_is_wanted(self):
        kept = Component.of({"name": "quantized", "format": "fp8", "group": 4, "keys": True, "inner": "mmap"})
        assert stack_of(Component("ram"), kept) == kept
        inside = stack_of(Component.of({"name": "quantized", "format": "fp8", "group": 4, "inner": TIERS}), kept)
        assert inside.options["inner"]["name"] == "tiered"
        outside = stack_of(Component.of({"name": "quantized", "inner": TIERS}), kept)
        assert outside.name == "tiered"
        assert Component.of(outside.options["inner"]) == kept
        layout = StoreLayout(layers=1, hidden_size=4)
        for kind in (kept, inside, outside):
            assert Component.of(saved_stack(STORES.build(kind, layout))) == kept

    def test_a_store_without_files_is_refused(self):
        with pytest.raises(MemoryMismatchError, match="around 'mmap', got 'ram'"):
            mapped_store(RamStore(StoreLayout(layers=1, hidden_size=4)))


def test_a_decoder_reads_from_tiers_above_quantised_files(tmp_path: Path) -> None:
    store = {"name": "quantized", "inner": {"name": "tiered", "device_bytes": "4KiB", "host_bytes": "16KiB"}}
    model = tiny.variant("paper")
    ordinary = model.new_memory(store="quantized")
    with Memory.open(tmp_path, model, store=store) as memory:
        for number in range(12):
            for one in (memory, ordinary):
                one.write(tiny.ids(40, number), source=f"{number % 3}")
    live = Memory.open(tmp_path, model, store=store)
    assert live.stores[0].inner.tiers()[0].rows == 0, "nothing is read yet"
    prompt = tiny.prompts(1)
    with torch.no_grad():
        expected = model(prompt, memory=ordinary).logits
        for _ in range(2):
            assert torch.equal(model(prompt, memory=live).logits, expected)
    device, _, below = live.stores[0].inner.tiers()
    assert device.hits > 0
    assert below.hits > 0
    live.forget("1")
    ordinary.forget("1")
    assert_same(live, ordinary)
