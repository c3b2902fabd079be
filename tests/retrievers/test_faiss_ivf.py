"""The retriever "faiss_ivf": its index follows the rows of a store, and answers for views of every age."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import sys
import threading
from typing import ClassVar

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from mplus.errors import ConfigError, MissingDependencyError
from mplus.mechanisms.short_term.pending import PendingView
from mplus.registry import Registry
from mplus.retrievers.faiss_ivf import FaissIvfRetriever
from mplus.retrievers.linear import LinearRetriever
from mplus.stores.ram import RamStore, SlabView
from mplus.testing.drawing import draw_rows
from mplus.testing.projections import SmallAttention
from mplus.testing.retrievers import SHAPE, RetrieverConformance
from tests.helpers.indexed import LAYOUT, WIDTH, append, check_best, check_scores, made, normal, select, store_of
from tests.memory.interruption import interrupted_everywhere
from tests.memory.tiny import build, prompts

pytestmark = pytest.mark.two_computations


class Indexed(RetrieverConformance):
    """With an index from the first rows on."""

    implementation = FaissIvfRetriever
    options: ClassVar[dict] = {}

    def make(self, shape=SHAPE):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            retriever = FaissIvfRetriever(shape, FaissIvfRetriever.Options(width=WIDTH, **self.options))
        retriever.attach(SmallAttention(shape))
        return retriever


class TestAllCells(Indexed):
    """An index that looks into all of its cells is exact."""

    options: ClassVar[dict] = {"least": 3, "cells": 3, "probes": 3}


class TestSomeCells(Indexed):
    """One that looks into few of them finds as many rows, and most of the best."""

    exact = False
    options: ClassVar[dict] = {"least": 3, "cells": 3, "probes": 1}
    least_recall = 0.5


class SomeOfManyCells(Indexed):
    exact = False
    options: ClassVar[dict] = {"least": 40, "cells": 24, "probes": 6}


class SigmoidMean(SomeOfManyCells):
    """The rows nearest to the mean query, ranked by another score: sometimes few of the best."""

    options: ClassVar[dict] = {"least": 40, "cells": 24, "probes": 6, "score": "sigmoid_mean"}
    least_recall = 0.5


@pytest.mark.parametrize("kind", [SomeOfManyCells, SigmoidMean])
@pytest.mark.parametrize("length", [1, 40])
def test_finds_most_of_the_best(kind, length):
    kind().test_finds_the_best_of_clustered_rows(length)


class Uncounted(RamStore):
    """A store that does not count its changes."""

    def revision(self, layer):
        return None

    def snapshot(self):
        view = super().snapshot()
        view.__class__ = UncountedView
        return view


class UncountedView(SlabView):
    def revision(self, layer):
        return None


class Following(RuleBasedStateMachine):
    """Whatever happens to a store, and whichever of its views is read, an index of all cells reads as ``linear``."""

    kind: ClassVar[type] = RamStore
    views = Bundle("views")

    def __init__(self):
        super().__init__()
        self.store = self.kind(LAYOUT)
        self.linear = made(LinearRetriever)
        self.indexed = made(least=4, cells=2, probes=2, outgrown=1.0)
        self.seed = 0

    @rule(count=st.integers(0, 7))
    def write(self, count):
        self.seed += 1
        append(self.store, normal(count, self.seed))

    @rule(count=st.integers(0, 6))
    def evict(self, count):
        self.store.remove(0, self.store.ids(0)[:count])

    @rule(places=st.lists(st.integers(0, 20), max_size=5))
    def forget(self, places):
        ids = self.store.ids(0)
        self.store.remove(0, ids[[place for place in set(places) if place < len(ids)]])

    @rule(target=views)
    def snapshot(self):
        return self.store.snapshot()

    @rule(view=views)
    def restore(self, view):
        self.store.restore(view)

    def check(self, view, k, seed):
        text = normal(2, seed)
        for retriever in (self.indexed, self.linear):
            check_best(select(retriever, view, k, text), view, k, text)

    @rule(k=st.integers(0, 9), seed=st.integers(0, 99))
    def read(self, k, seed):
        self.check(self.store, k, seed)

    @rule(view=views, k=st.integers(0, 9), seed=st.integers(0, 99))
    def read_a_snapshot(self, view, k, seed):
        self.check(view, k, seed)

    @invariant()
    def the_index_holds_what_its_ids_say(self):
        for slots in self.indexed.index_cache._slots.values():
            for slot in slots.values():
                if slot.index is not None:
                    assert slot.index._index.ntotal == len(slot.index.ids)
                    assert slot.index.tensors()["cell"].shape == slot.index.ids.shape


@pytest.mark.parametrize("kind", [RamStore, Uncounted])
def test_an_index_follows_its_store(kind):
    class Machine(Following):
        pass

    Machine.kind = kind
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=20,
            stateful_step_count=25,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


class TestIndex:
    def test_changes_are_made_to_the_index_not_a_new_one(self, caplog):
        retriever, store = made(least=50, cells=8), store_of(normal(60))
        with caplog.at_level(logging.INFO, "mplus"):
            select(retriever, store, 5)
            first = retriever.index_facts(0, store)
            append(store, normal(20, 1))
            store.remove(0, store.ids(0)[:10])
            select(retriever, store, 5)
        assert first == {"rows": 60, "cells": 8, "trained_on": 60, "added": 60}
        assert retriever.index_facts(0, store) == {"rows": 70, "cells": 8, "trained_on": 60, "added": 80}
        assert [record.levelname for record in caplog.records] == ["INFO"]
        assert "an index of 8 cells was trained on 60 rows" in caplog.text

    def test_it_is_made_anew_when_the_rows_have_outgrown_it(self):
        retriever, store = made(least=50, outgrown=2.0), store_of(normal(60))
        select(retriever, store, 5)
        for turn in range(6):  # rows come and go: their number stays
            append(store, normal(20, turn + 1))
            store.remove(0, store.ids(0)[:20])
            select(retriever, store, 5)
        assert retriever.index_facts(0, store) == {
            "rows": 60,
            "cells": 15,
            "trained_on": 60,
            "added": 60 + 120,
        }
        append(store, normal(40, 9))
        select(retriever, store, 5)
        assert retriever.index_facts(0, store) == {
            "rows": 100,
            "cells": 20,
            "trained_on": 100,
            "added": 100,
        }

    def test_few_rows_and_rows_whose_ids_do_not_last_are_read_exactly(self):
        retriever, store = made(least=61, cells=8, probes=1), store_of(normal(60))
        waiting = draw_rows(LAYOUT, 5, 1).replace(key=normal(5, 7))
        for view in (store, PendingView(store_of(normal(80)), [waiting])):
            assert retriever.index_facts(0, view) == {}
            found, expected = select(retriever, view, 9), select(made(LinearRetriever), view, 9)  # the same code
            assert found.ids.tolist() == expected.ids.tolist()
            assert found.scores.tolist() == expected.scores.tolist()

    def test_an_older_snapshot_is_read_while_more_is_written(self):
        """The newer index gives back only rows of the snapshot, and those it lost meanwhile are found all the same."""
        retriever, store = made(least=50, cells=8, probes=8), store_of(normal(200))
        select(retriever, store, 5)
        old = store.snapshot()
        expected = select(made(LinearRetriever), old, 30)
        append(store, 3 * normal(200, 5))
        store.remove(0, expected.ids[:20])
        select(retriever, store, 5)
        newer = retriever.index_facts(0, store)
        check_best(select(retriever, old, 30), old, 30)
        assert retriever.index_facts(0, store) == newer

    def test_forgotten_rows_leave_the_index(self):
        retriever, store = made(least=50, cells=8), store_of(normal(60))
        select(retriever, store, 5)
        gone = store.ids(0)[50:55].clone()  # the newest too
        store.remove(0, gone)
        select(retriever, store, 5)
        slot = retriever.index_cache._slots[store.identity][0]
        assert not set(slot.index.ids.tolist()) & set(gone.tolist())
        store.remove(0, store.ids(0)[:10])
        select(retriever, store, 5)
        assert retriever.index_cache._slots[store.identity] == {}, "too few are left for an index"

    def test_a_memory_that_forgets_lets_its_index_forget_at_once(self):
        """Without a read in between: nothing of what was forgotten stays in this process."""
        model = build(long_term_tokens=None, retriever={"name": "faiss_ivf", "width": 8, "least": 8, "cells": 2})
        memory = model.new_memory()
        for source, seed in (("a", 1), ("b", 2)):
            ids = torch.randint(3, 60, (160,), generator=torch.Generator().manual_seed(seed))
            memory.write(ids, source=source, progress=False)
        with torch.no_grad():
            model(input_ids=prompts(1), memory=memory)
        [store], slots = memory.stores, model.mplus_engine.mechanism.retriever.index_cache._slots
        indexes = [slot.index for slot in slots[memory.stores[0].identity].values()]
        assert [len(index) for index in indexes] == [store.count(layer) for layer in range(3)]
        memory.forget("a")
        assert [index.ids.tolist() for index in indexes] == [store.ids(layer).tolist() for layer in range(3)]

    def test_as_many_rows_as_wanted_come_back_from_cells_that_hold_too_few(self):
        """Nearly all rows in one cell, far from what is asked."""
        keys = torch.cat([normal(3, 1) + 20, normal(200, 2) - 20])
        retriever = made(least=50, cells=4, probes=1)
        found = select(retriever, store_of(keys), 60, torch.full((1, WIDTH), 1.0))
        assert len(found.ids) == 60
        assert {0, 1, 2} <= set(found.ids.tolist())

    def test_a_change_of_the_index_that_is_interrupted(self):
        """A row that an interrupt left in the index twice came back twice, one that it left out never."""
        kept, state = normal(60), {}

        def prepare():
            store = state["store"] = store_of(kept)
            retriever = state["retriever"] = made(least=3, cells=3, probes=3)
            select(retriever, store, 20)
            state["older"] = store.snapshot()
            store.remove(0, store.ids(0)[10:30])
            append(store, normal(30, 1))

        places = interrupted_everywhere(
            prepare, lambda: select(state["retriever"], state["store"], 20), "retrievers/ivf.py", most=60
        )
        counted = 0
        for _ in places:
            counted += 1
            for view in (state["older"], state["store"], state["older"]):
                found = select(state["retriever"], view, 20)
                check_best(found, view, 20)
                assert len(found.ids.unique()) == 20
        assert counted > 20

    def test_it_lives_as_long_as_the_store_or_a_snapshot(self):
        retriever, store = made(least=50), store_of(normal(60))
        view = store.snapshot()
        select(retriever, store, 5)
        del store
        gc.collect()
        assert retriever.index_facts(0, view)["rows"] == 60
        assert len(retriever.index_cache._slots) == 1
        del view
        gc.collect()
        assert len(retriever.index_cache._slots) == 0

    def test_a_fork_has_an_index_of_its_own(self):
        retriever, store = made(least=50, cells=4, probes=4), store_of(normal(60))
        select(retriever, store, 5)
        fork = store.fork()
        append(fork, 9 * normal(5, 3))
        append(store, 9 * normal(5, 4))
        for view in (fork, store):
            check_best(select(retriever, view, 7), view, 7)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_keys_that_are_not_finite_are_read_as_linear_reads_them(self, bad, caplog):
        keys = normal(60)
        keys[7] = bad
        retriever = made(least=50, cells=4)
        with caplog.at_level(logging.INFO, "mplus"):
            found = select(retriever, store_of(keys), 60)
        assert found.ids.tolist() == select(made(LinearRetriever), store_of(keys), 60).ids.tolist()
        assert "finite" in caplog.text or not caplog.records  # 60 of 60 rows need no index
        with caplog.at_level(logging.INFO, "mplus"):
            select(retriever, store_of(keys), 5)
        assert "layer 0 is searched exactly: keys in an index must be finite" in caplog.text

    def test_a_query_that_is_not_finite_is_read_as_linear_reads_it(self):
        retriever, store = made(least=50), store_of(normal(60))
        text = torch.full((1, WIDTH), float("nan"))
        assert select(retriever, store, 5, text).ids.tolist() == [0, 1, 2, 3, 4]

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
    def test_copies_begin_without_an_index(self, duplicate):
        retriever, store = made(least=50, cells=4), store_of(normal(60))
        select(retriever, store, 5)
        other = duplicate(retriever)
        assert len(other.index_cache._slots) == 0
        check_best(select(other, store, 5), store, 5)

    def test_the_parameters_of_linear_are_taken(self):
        linear, indexed = made(LinearRetriever), made()
        indexed.load_state_dict(linear.state_dict())
        assert indexed.facts() == linear.facts()

    def test_most_of_the_best_are_found_in_a_part_of_the_cells(self):
        """Clustered keys, a quarter of the cells; and scores are exact."""
        generator = torch.Generator().manual_seed(0)
        centers = torch.randn(60, WIDTH, generator=generator)
        keys = centers.repeat(100, 1) + 0.4 * torch.randn(6000, WIDTH, generator=generator)
        store, retriever = store_of(keys), made(least=50, cells=64, probes=16)
        shares = []
        for number in range(20):
            text = centers[number : number + 1] + 0.4 * torch.randn(1, WIDTH, generator=generator)
            found, exact = select(retriever, store, 50, text), select(made(LinearRetriever), store, 50, text)
            shares.append(float(torch.isin(exact.ids, found.ids).float().mean()))
            check_scores(found, store, text)
        assert sum(shares) / len(shares) > 0.95

    def test_reads_and_writes_of_several_threads(self):
        """faiss ends the process where an addition meets a search; answers are right, too."""
        store, retriever = store_of(normal(4000)), made(least=50, cells=16, probes=16)
        views, wrong = [store.snapshot()], []

        def read():
            for turn in range(25):
                view = views[-1 - turn % min(2, len(views))]
                try:
                    check_best(select(retriever, view, 20), view, 20)
                except AssertionError as error:
                    wrong.append((turn, error))

        readers = [threading.Thread(target=read) for _ in range(3)]
        for reader in readers:
            reader.start()
        for turn in range(25):
            append(store, normal(50, turn + 1))
            store.remove(0, store.ids(0)[:40])
            views.append(store.snapshot())
        for reader in readers:
            reader.join()
        assert wrong == []


def test_without_faiss_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    for name in ("faiss_ivf", "index_cache", "ivf"):
        monkeypatch.delitem(sys.modules, f"mplus.retrievers.{name}")
    registry = Registry(
        "retriever",
        group="mplus.retrievers",
        base="mplus.retrievers.base:Retriever",
        builtin={"faiss_ivf": "mplus.retrievers.faiss_ivf:FaissIvfRetriever"},
    )
    with pytest.raises(MissingDependencyError, match=r"pip install 'mplus\[faiss\]'"):
        registry.get("faiss_ivf")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"least": 0}, "least must be a whole number of at least 1, got 0"),
        ({"cells": 0}, "cells must be .*, or None, got 0"),
        ({"probes": 1.5}, "probes must be .* got 1.5"),
        ({"oversample": 0}, "oversample must be a number of at least 1, got 0"),
        ({"outgrown": -1}, "outgrown must be a number of at least 0, got -1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        FaissIvfRetriever.Options(**options)
