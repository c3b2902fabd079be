"""Slabs, and the memory they lie in: what is copied, what is shared, and when memory is used again."""

from __future__ import annotations

import gc
import pickle

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mplus.stores.base import StoreLayout, chunk_min
from mplus.stores.ram import RamStore
from mplus.stores.slabs import block
from mplus.stores.slabs.block import Block, RamAllocator
from mplus.stores.slabs.layer import SlabLayer
from mplus.stores.slabs.slab import Slab, SlabSizes
from mplus.testing.drawing import draw_rows
from mplus.testing.strategies import CONFORMANCE
from tests.stores.test_stores import CountWrites

LAYOUT = StoreLayout(layers=1, hidden_size=16, key_size=4)


def slabs_of(store: RamStore) -> tuple[Slab, ...]:
    return store.slab_layers[0].slabs


def new_store(slab_rows: int = 64, **options: float) -> RamStore:
    return RamStore(LAYOUT, RamStore.Options(slab_rows=slab_rows, **options))


class TestCost:
    def test_the_oldest_leave_and_every_row_is_copied_once(self):
        store, piece = new_store(), draw_rows(LAYOUT, 10, 1)
        for _ in range(40):
            store.append(0, piece)
        with CountWrites() as writes:
            for _ in range(100):
                store.append(0, piece)
                store.remove(0, store.ids(0)[:10])
        assert writes.elements == 16 * 10 * 100
        assert store.nbytes <= 1.5 * 400 * (16 * 4 + 4 * 4 + 3 * 8)

    def test_removing_in_the_middle_costs_at_most_the_slab(self):
        store = new_store(expected_rows=64)
        store.append(0, draw_rows(LAYOUT, 640, 1))
        before = slabs_of(store)
        with CountWrites() as writes:
            store.remove(0, torch.arange(130, 170))
        assert writes.elements == 0
        with CountWrites() as writes:
            store.remove(0, torch.arange(170, 190))
        assert writes.elements == 4 * 16, "four rows are left in that slab"
        after = slabs_of(store)
        assert [slab.count for slab in after] == [64, 64, 4, 64, 64, 64, 64, 64, 64, 64]
        assert all(one is other for place, (one, other) in enumerate(zip(before, after, strict=True)) if place != 2)

    def test_a_bulk_append_fills_the_room_there_is_and_then_slabs(self):
        store, parts = new_store(), [draw_rows(LAYOUT, count, count) for count in (20, 40, 10, 200)]
        for part in parts:
            store.append(0, part)
        *full, last = slabs_of(store)
        assert [len(slab) for slab in full] == [slab.block.capacity for slab in full]
        assert max(slab.block.capacity for slab in (*full, last)) == 64
        assert torch.equal(store.gather(0, store.ids(0)).hidden, torch.cat([part.hidden for part in parts]))

    def test_expected_rows_have_room_from_the_beginning(self):
        store = new_store(slab_rows=1000, expected_rows=500)
        store.append(0, draw_rows(LAYOUT, 1, 1))
        with CountWrites() as writes:
            for _ in range(499):
                store.append(0, draw_rows(LAYOUT, 1, 2))
        assert len(slabs_of(store)) == 1
        assert writes.elements == 499 * 2 * 16, "drawn, and appended"

    def test_forks_share_slabs_and_the_second_to_append_takes_a_small_block(self):
        store = new_store(slab_rows=64)
        store.append(0, draw_rows(LAYOUT, 130, 1))
        store.append(0, draw_rows(LAYOUT, 1, 1))
        fork, piece = store.fork(), draw_rows(LAYOUT, 2, 2)
        store.append(0, piece)
        with CountWrites() as writes:
            fork.append(0, piece)
        assert writes.elements <= (2 + 16) * 16
        shared = {id(slab.block) for slab in slabs_of(store)} & {id(slab.block) for slab in slabs_of(fork)}
        assert len(shared) >= 2
        assert slabs_of(fork)[-1].block.capacity <= 16

    @CONFORMANCE
    @given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(0, 60)), max_size=12))
    def test_room_stays_in_proportion(self, steps):
        store = new_store(slab_rows=16)
        for added, removed, place in steps:
            store.append(0, draw_rows(LAYOUT, added, 1))
            store.remove(0, store.ids(0)[place : place + removed])
            count = store.count(0)
            assert store.slab_layers[0].capacity <= 4 * count + (1 if count >= 4 else 0)
            for slab in slabs_of(store):
                assert slab.count <= len(slab) <= 4 * slab.count
                assert slab.live is None or (bool(slab.live[0]) and bool(slab.live[-1]))


class TestSeam:
    def test_a_layer_is_made_from_facts(self):
        store = new_store(slab_rows=8)
        store.append(0, draw_rows(LAYOUT, 30, 1))
        store.remove(0, torch.tensor([1, 12, 13, 29]))
        layer = store.slab_layers[0]
        facts = [(s.block.columns, s.block.capacity, s.start, s.tip, s.live, s.end) for s in layer.slabs]
        allocator = RamAllocator(LAYOUT)
        slabs = []
        for columns, capacity, start, tip, live, end in facts:
            block = Block({name: c.clone() for name, c in columns.items()}, home=allocator, taken=tip)
            mask = None if live is None and end == tip else torch.zeros(tip - start, dtype=torch.bool)
            if mask is not None:
                mask[: end - start] = True if live is None else live
            slabs.append(Slab.of(block, start, tip, mask))
            assert block.capacity == capacity
        again = SlabLayer(LAYOUT, layer.sizes, allocator, tuple(slabs), layer.next_id)
        assert again.ids.tolist() == layer.ids.tolist()
        more = draw_rows(LAYOUT, 5, 2)
        one, other = layer.append(more), again.append(more)
        for name in ("id", "hidden", "birth"):
            assert torch.equal(one.column(name), other.column(name))

    def test_a_layer_writes_only_into_blocks_of_its_own_allocator(self):
        base = SlabLayer(LAYOUT, SlabSizes(), RamAllocator(LAYOUT))
        layer = base.append(draw_rows(LAYOUT, 4, 1)).append(draw_rows(LAYOUT, 1, 1))
        (slab,) = layer.slabs
        assert slab.tip < slab.block.capacity
        before = slab.block.columns["birth"].clone()
        elsewhere = attrs.evolve(layer, allocator=RamAllocator(LAYOUT)).append(draw_rows(LAYOUT, 1, 2))
        assert elsewhere.slabs[-1].block is not slab.block
        assert torch.equal(slab.block.columns["birth"], before)
        assert layer.append(draw_rows(LAYOUT, 1, 2)).slabs[-1].block is slab.block


class TestMemoryIsUsedAgain:
    @pytest.fixture(autouse=True)
    def small_columns_too(self, monkeypatch):
        monkeypatch.setattr(block, "KEPT_BYTES", 1)

    @staticmethod
    def pointers(block: Block) -> dict[str, int]:
        return {name: column.data_ptr() for name, column in block.columns.items()}

    def test_by_the_next_block_of_that_size(self):
        allocator = RamAllocator(LAYOUT)
        held = [allocator.allocate(100) for _ in range(3)]
        block = allocator.allocate(100)
        where = self.pointers(block)
        del block
        assert allocator.spare_bytes == 100 * (16 * 4 + 4 * 4 + 3 * 8)
        assert self.pointers(allocator.allocate(100))["hidden"] == where["hidden"]
        assert allocator.allocate(50).columns["hidden"].data_ptr() != where["hidden"]
        assert len(held) == 3

    @pytest.mark.parametrize("how", ["view", "expanded", "detached", "numpy", "graph"])
    def test_not_while_anybody_looks_at_it(self, how):
        allocator = RamAllocator(LAYOUT)
        held = [allocator.allocate(100) for _ in range(3)]
        block = allocator.allocate(100)
        block.columns["hidden"].fill_(3.0)
        column = block.columns["hidden"][10:20]
        seen = {
            "view": lambda part: part.view(-1)[4:],
            "expanded": lambda part: part.expand(2, -1, -1),
            "detached": torch.Tensor.detach,
            "numpy": torch.Tensor.numpy,
            "graph": lambda part: (part @ torch.ones(16, 1, requires_grad=True)).sum(),
        }[how](column)
        where = self.pointers(block)
        del block, column
        fresh = allocator.allocate(100)
        assert fresh.columns["hidden"].data_ptr() != where["hidden"], how
        if how != "graph":
            fresh.columns["hidden"].fill_(0.0)
            assert (seen == 3.0).all()
        del seen, fresh
        gc.collect()
        assert len(held) == 3

    def test_a_steady_flow_allocates_nothing(self, monkeypatch):
        store, piece = new_store(slab_rows=32), draw_rows(LAYOUT, 8, 1)
        made = []
        allocate = torch.empty

        def counted(*size, **options):
            if options.get("dtype") == torch.uint8:
                made.append(size)
            return allocate(*size, **options)

        monkeypatch.setattr(block.torch, "empty", counted)
        for step in range(200):
            store.append(0, piece)
            if store.count(0) > 256:
                store.remove(0, torch.arange(8) + int(store.ids(0)[0]))
            if step == 60:
                made.clear()
        assert made == []

    def test_at_most_half_as_much_is_kept_as_is_in_use(self):
        allocator = RamAllocator(LAYOUT)
        held = [allocator.allocate(100) for _ in range(10)]
        size = held[0].nbytes
        while held:
            held.pop()
            assert allocator.spare_bytes <= len(held) * size / 2
        assert allocator.spare_bytes == 0

    def test_snapshots_keep_their_rows(self):
        store = new_store(slab_rows=8)
        rows = draw_rows(LAYOUT, 60, 1)
        store.append(0, rows)
        snapshot = store.snapshot()
        for step in range(40):
            store.remove(0, store.ids(0)[:8])
            store.append(0, draw_rows(LAYOUT, 8, 2 + step))
        assert torch.equal(snapshot.gather(0, torch.arange(60)).hidden, rows.hidden)

    def test_pickled_stores_have_memory_of_their_own(self):
        store = new_store(slab_rows=8)
        store.append(0, draw_rows(LAYOUT, 60, 1))
        twin = pickle.loads(pickle.dumps(store))
        hidden = store.gather(0, store.ids(0)).hidden
        del store
        twin.append(0, draw_rows(LAYOUT, 60, 2))
        assert torch.equal(twin.gather(0, torch.arange(60)).hidden, hidden)


def test_the_smallest_birth_is_that_of_a_row_that_is_there():
    store = new_store(slab_rows=16, expected_rows=16)
    store.append(0, draw_rows(LAYOUT, 5, 1).replace(birth=torch.tensor([7, 2, 9, 4, 8])))
    assert chunk_min(store.chunks(0, "birth")[0], "birth") == 2
    store.remove(0, torch.tensor([1]))
    assert chunk_min(store.chunks(0, "birth")[0], "birth") == 4


def test_a_limited_layer_keeps_within_its_bytes_even_where_columns_are_large():
    """Memory that nobody uses is given back, not kept for later blocks."""
    layout = StoreLayout(layers=1, hidden_size=16_384)  # blocks of 25 rows have columns above ``KEPT_BYTES``
    store, rows = RamStore(layout), draw_rows(layout, 20, 0)
    store.set_capacity(400)
    for _ in range(60):
        store.append(0, rows)
        excess = store.count(0) - 400
        if excess > 0:
            store.remove(0, store.ids(0)[:excess])
        assert store.nbytes <= store.bytes_for(400) == 450 * store.bytes_per_row
    assert max(slab.block.nbytes for slab in store.slab_layers[0].slabs) > block.KEPT_BYTES


def test_transposed_keys_are_the_same_keys_after_every_change():
    plain = attrs.evolve(LAYOUT, key_size=24)
    stores = [RamStore(layout) for layout in (plain, attrs.evolve(plain, transposed_keys=True))]
    for number in range(4):
        rows = draw_rows(plain, 700, number)
        for store in stores:
            store.append(0, rows)
            store.remove(0, store.ids(0)[1::3])
    for store in stores:
        store.remove(0, store.ids(0)[:-40])  # the rest moves to a block of its own
    wanted, found = (store.column(0, "key") for store in stores)
    assert torch.equal(found, wanted)
    assert torch.equal(stores[1].gather(0, stores[1].ids(0)[[3, 1]]).key, wanted[[3, 1]])
    (slab,) = slabs_of(stores[1])
    assert slab.column("key").stride(0) == 1, "they lie transposed"
    assert slab.column("hidden").stride(0) == 16
    assert slabs_of(stores[0])[0].column("key").stride(0) == 24
