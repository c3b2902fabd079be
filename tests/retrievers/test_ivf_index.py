"""The index behind "faiss_ivf": saved, taken over, searched on a GPU, and what it refuses."""

from __future__ import annotations

import copy
import logging

import faiss
import pytest
import torch

from mplus.errors import InputError, NotSupported
from mplus.retrievers import ivf
from mplus.retrievers.base import Selection
from mplus.retrievers.index_cache import differences
from mplus.retrievers.ivf import IvfIndex
from tests.helpers.indexed import append, check_alike, check_best, made, normal, select, store_of

pytestmark = pytest.mark.two_computations


class TestSaving:
    def test_an_equal_store_takes_an_index_over_without_training(self, caplog):
        retriever, store = made(least=50, cells=12, probes=2), store_of(normal(300))
        store.remove(0, store.ids(0)[10:40])
        append(store, normal(20, 1))
        expected = select(retriever, store, 20)
        tensors = retriever.index_tensors(0, store)
        other, again = made(least=50, cells=12, probes=2), store_of(store.keys(0))  # other ids
        with caplog.at_level(logging.INFO, "mplus"):
            other.load_index(0, again, tensors)
            found = select(other, again, 20)
        assert not caplog.records
        assert other.index_facts(0, again) == retriever.index_facts(0, store)
        places = torch.searchsorted(store.ids(0), expected.ids)
        check_alike(found, Selection(again.ids(0)[places], expected.scores), again)
        append(again, normal(5, 8))
        assert other.index_facts(0, again)["added"] == tensors["added"] + 5

    def test_there_is_nothing_to_save_without_an_index(self):
        retriever, store = made(least=50), store_of(normal(20))
        assert retriever.index_tensors(0, store) == {}
        retriever.load_index(0, store, made(least=5).index_tensors(0, store_of(normal(20))))
        assert retriever.index_facts(0, store) == {}

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"centers": None}, "must have centers, which are missing"),
            ({"centers": torch.zeros(4, 3)}, "its keys must be 3 wide, got 8"),
            ({"centers": torch.zeros(4)}, r"centers must be \[cells, r\] float32, got \[4\]"),
            ({"centers": torch.zeros(4, 8).double()}, "float64"),
            ({"centers": torch.full((4, 8), torch.nan)}, "centers must be finite"),
            ({"cell": torch.zeros(5, dtype=torch.int32)}, r"cell must be \[60\] int32, got \[5\]"),
            ({"cell": torch.full((60,), 4, dtype=torch.int32)}, r"cell must be in 0\.\.3, got 4 to 4"),
            ({"cell": torch.full((60,), -1, dtype=torch.int32)}, r"got -1 to -1"),
            ({"added": torch.tensor(-1)}, "added must be a number of at least 0"),
        ],
    )
    def test_tensors_of_something_else_are_refused(self, changes, message):
        retriever, store = made(least=50, cells=4), store_of(normal(60))
        assert retriever.index_tensors(0, store) == {}, "nothing was read yet, and saving trains nothing"
        select(retriever, store, 5)
        tensors = {**retriever.index_tensors(0, store), **changes}
        tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        other = made(least=50, cells=4)
        with pytest.raises(InputError, match=message):
            other.load_index(0, store, tensors)
        # The same code over the same keys.
        assert select(other, store, 5).ids.tolist() == select(retriever, store, 5).ids.tolist()


class TestIvfIndex:
    def test_ids_that_come_again_are_refused(self):
        index = IvfIndex.train(normal(20), 2, 20)
        index.add(torch.tensor([4, 9]), normal(2))
        with pytest.raises(InputError, match=r"larger than those in the index \(9\), got 9"):
            index.add(torch.tensor([9]), normal(1))

    def test_more_cells_than_keys_are_refused(self):
        with pytest.raises(InputError, match=r"as it has cells \(5\), got 4"):
            IvfIndex.train(normal(4), 5, 4)


class TestGpu:
    """With the CPU in its place, which is held to what faiss can do on a GPU."""

    @pytest.fixture
    def copies(self, monkeypatch):
        made = []

        class Copy:
            def __init__(self, index):
                self.index, self.asked = faiss.clone_index(index), []
                made.append(self)

            def search(self, queries, k, params):
                assert max(k, params.nprobe) <= ivf.GPU_MOST
                assert params.sel is None
                self.asked.append(k)
                return self.index.search(queries, k, params=params)

        monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
        monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
        monkeypatch.setattr(faiss, "index_cpu_to_gpu", lambda resources, device, index: Copy(index), raising=False)
        monkeypatch.setattr(ivf, "GPU_MOST", 30)
        return made

    def test_searches_copies_as_far_as_a_gpu_can(self, copies):
        store = store_of(normal(100))
        retriever = made(least=50, cells=8, probes=8, gpu=True)
        old = store.snapshot()
        for k in (5, 7, 60):
            check_best(select(retriever, store, k), store, k)
        assert [copy.asked for copy in copies] == [[5 + 4, 7 + 4]], "60 rows are too many"
        append(store, normal(20, 1))
        check_best(select(retriever, store, 5), store, 5)
        check_best(select(retriever, old, 5), old, 5)  # rows are left out
        store.remove(0, store.ids(0)[:20])
        check_best(select(retriever, store, 5), store, 5)
        assert [copy.asked for copy in copies] == [[9, 11], [9], [9]]

    def test_an_index_that_is_taken_over_and_a_copy_of_the_retriever_use_it_too(self, copies):
        store, retriever = store_of(normal(100)), made(least=50, cells=8, gpu=True)
        select(retriever, store, 5)
        copies.clear()
        tensors = retriever.index_tensors(0, store)
        other = copy.deepcopy(retriever)
        other.load_index(0, store, tensors)
        select(other, store, 5)
        assert len(copies) == 1

    def test_without_a_gpu_it_is_refused(self):
        with pytest.raises(NotSupported, match=r"install 'mplus\[faiss-gpu\]' instead"):
            made(gpu=True)


@pytest.mark.parametrize("seed", range(20))
def test_differences_equal_those_of_sets(seed):
    generator = torch.Generator().manual_seed(seed)
    old, new = (torch.rand(12, generator=generator).lt(0.6).nonzero().squeeze(1) for _ in range(2))
    if seed % 3 == 0:
        new = torch.cat([old[2:], torch.tensor([20, 21])])
    gone, came = differences(old, new)
    assert gone.tolist() == sorted(set(old.tolist()) - set(new.tolist()))
    assert came.tolist() == sorted(set(new.tolist()) - set(old.tolist()))
