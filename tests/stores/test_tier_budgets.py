"""No tier ever exceeds its budget, whatever is read; and which rows make room."""

from __future__ import annotations

import types
import weakref
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule, run_state_machine_as_test

from mplus.stores.ram import RamStore
from mplus.stores.tiered import TieredStore
from mplus.stores.tiers import cache as caches
from mplus.stores.tiers import resident as smalls
from mplus.stores.tiers.cache import RowCache
from mplus.testing.store_model import StoreMachine
from mplus.testing.strategies import CONFORMANCE
from tests.helpers.tiering import LAYOUT, append, assert_same, tiered


class Allocations:
    """Bytes held by the tensors that tiers are made of, at each time one of them was made."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.each: list[int] = []
        self._made: list[tuple[weakref.ref, int]] = []
        counting = types.SimpleNamespace(**vars(torch))
        counting.empty, counting.full = self._counting(torch.empty), self._counting(torch.full)
        for module in (caches, smalls):
            patch.setattr(module, "torch", counting)

    def _counting(self, make):
        def made(*arguments, **named):
            tensor = make(*arguments, **named)
            self._made.append((weakref.ref(tensor), tensor.nbytes))
            self.each.append(sum(size for reference, size in self._made if reference() is not None))
            return tensor

        return made


def change(store: TieredStore, plain: RamStore, kind: str, size: int, seed: int) -> None:
    """Do the same to both, and compare."""
    layer = seed % 2
    ids = plain.ids(layer)
    if kind == "append":
        assert append(store, size, seed, layer).tolist() == append(plain, size, seed, layer).tolist()
    elif len(ids):
        picks = ids[torch.randint(len(ids), (size,), generator=torch.Generator().manual_seed(seed))]
        if kind == "read":
            assert_same(store.gather(layer, picks), plain.gather(layer, picks))
        else:
            store.remove(layer, picks)
            plain.remove(layer, picks)
    for name in ("key", "birth"):
        assert torch.equal(store.column(layer, name), plain.column(layer, name))


class TestBudgets:
    @CONFORMANCE
    @given(
        device=st.integers(0, 1500),
        host=st.integers(0, 1500),
        share=st.sampled_from([0.0, 0.3, 0.5, 0.9]),
        steps=st.lists(
            st.tuples(st.sampled_from(["append", "remove", "read", "fork"]), st.integers(0, 12), st.integers(0, 99)),
            max_size=15,
        ),
    )
    def test_every_read_is_that_of_ram_and_no_budget_is_exceeded(self, device, host, share, steps):
        """At every allocation, too: what was let go before counts no more, and what is moved counts twice."""
        with pytest.MonkeyPatch.context() as patch:
            held = Allocations(patch)
            stores = [(tiered(device_bytes=device, host_bytes=host, small_share=share), RamStore(LAYOUT))]
            for kind, size, seed in steps:
                if kind == "fork":
                    stores = [*stores[:2], tuple(one.fork() for one in stores[0])]
                else:
                    change(*stores[seed % len(stores)], kind, size, seed)
                for store, _ in stores:
                    assert all(report.nbytes <= report.budget for report in store.tiers()[:2])
                    assert store.shared is stores[0][0].shared
        assert all(now <= device + host for now in held.each)

    def test_any_sequence_of_changes_stays_inside(self):
        class Machine(StoreMachine):
            def __init__(self):
                super().__init__(tiered, lambda view, layer, rows: None)

            @rule(which=st.integers(0, 2), layer=st.integers(0, 1), places=st.lists(st.integers(0, 30), max_size=9))
            def read(self, which, layer, places):
                pair = self.stores[which % len(self.stores)]
                rows = pair.model[layer].rows
                if rows:
                    chosen = [rows[place % len(rows)] for place in places]
                    found = pair.real.gather(layer, torch.tensor([row_id for row_id, _ in chosen], dtype=torch.int64))
                    assert len(found) == len(chosen)
                    for place, (_, row) in enumerate(chosen):
                        assert_same(found.select(slice(place, place + 1)), row)

            @invariant()
            def budgets_hold(self):
                for pair in self.stores:
                    for report in pair.real.tiers()[:2]:
                        assert report.nbytes <= report.budget

        run_state_machine_as_test(Machine, settings=settings(CONFORMANCE, max_examples=20, stateful_step_count=30))

    def test_a_cache_keeps_its_rows_while_it_grows(self, monkeypatch):
        monkeypatch.setattr(caches, "FIRST_SETS", 2)
        monkeypatch.setattr(caches, "PIECE_BYTES", 100)
        cache = RowCache({"hidden": ((1,), torch.float32)}, 900 * 28, torch.device("cpu"))
        keys = torch.randperm(600, generator=torch.Generator().manual_seed(0)) + (torch.arange(600) % 3 << 40)
        column = {"hidden": torch.arange(600)[:, None].float()}
        sizes = set()
        for count in range(0, 600, 5):
            cache.put(keys[count : count + 5], {"hidden": column["hidden"][count : count + 5]})
            assert cache.nbytes <= 900 * 28
            sizes.add(cache.nbytes)
            places = cache.find(keys)
            here = places >= 0
            assert int(here.sum()) == cache.rows
            assert not here[count + 5 :].any()
            for columns, which, at in cache.parts(places[here]):
                assert torch.equal(columns["hidden"][at], column["hidden"][here][which])
        assert sizes == {28 * 16 * (3 << doubled) for doubled in range(5)}
        assert cache.rows > 570, "few of a set were in each other's way"
        cache.drop(keys[::2])
        places = cache.find(keys)
        assert (places[::2] < 0).all()
        assert cache.rows == int((places >= 0).sum())


STEPS = st.tuples(
    st.sampled_from(["find", "put", "offer", "drop"]), st.lists(st.integers(0, 25), unique=True, max_size=4)
)


@CONFORMANCE
@given(st.integers(1, 16), st.lists(STEPS))
def test_the_least_recently_used_row_makes_room(places, steps):
    """Up to 16 places a cache has one set, and is what an ordered dictionary is."""
    cache = RowCache({"hidden": ((1,), torch.float32)}, places * 28, torch.device("cpu"))
    model: OrderedDict[int, None] = OrderedDict()
    for kind, asked in steps:
        for key in asked:  # one by one: of those in one call none is older than another
            keys = torch.tensor([key])
            if kind == "find":
                assert (int(cache.find(keys)) >= 0) == (key in model)
                if key in model:
                    model.move_to_end(key)
            elif kind == "drop":
                model.pop(key, None)
                cache.drop(keys)
            else:
                if key not in model and (kind == "put" or len(model) < places):
                    model[key] = None
                    if len(model) > places:
                        model.popitem(last=False)
                cache.put(keys, {"hidden": keys[:, None].float()}, displace=kind == "put")
        assert cache.rows == len(model)
        assert cache.full == (len(model) == places)
    present = torch.tensor(list(model), dtype=torch.int64)
    assert (cache.find(present) >= 0).all()
