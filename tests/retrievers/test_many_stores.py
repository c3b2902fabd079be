"""Small stores are ranked together as each is ranked alone, ties and removed rows included."""

from __future__ import annotations

import pytest
import torch

from mplus.retrievers import many_stores
from mplus.retrievers.base import RetrieverShape
from mplus.retrievers.linear import LinearRetriever
from mplus.rows import MemoryRows
from mplus.stores.base import StoreLayout
from mplus.stores.ram import RamStore

LAYOUT = StoreLayout(layers=1, hidden_size=4, key_size=3)
ROWS = (0, 1, 5, 40, 41, 300, 700)


def store(rows: int, seed: int, slab_rows: int = 16384) -> RamStore:
    """Rows with few different keys, so that most scores are ties; some are removed, and one key is NaN."""
    generator = torch.Generator().manual_seed(seed)
    made = RamStore(LAYOUT, RamStore.Options(slab_rows=slab_rows))
    key = torch.randint(-1, 2, (rows, 3), generator=generator).float()
    key[rows // 2 : rows // 2 + 1] = torch.nan
    birth = torch.arange(rows)
    made.append(0, MemoryRows(hidden=torch.zeros(rows, 4), birth=birth, source=torch.zeros_like(birth), key=key))
    made.remove(0, made.ids(0)[torch.arange(rows) % 7 == 3])
    return made


@pytest.mark.parametrize("score", ["mean_dot", "sigmoid_mean"])
def test_together_as_alone(score: str, monkeypatch: pytest.MonkeyPatch) -> None:
    retriever = LinearRetriever(RetrieverShape(layers=1, hidden_size=4), LinearRetriever.Options(width=3, score=score))
    stores = [store(rows, seed) for seed, rows in enumerate(ROWS)]
    stores += [store(200, 50, slab_rows=32), stores[3]]  # of several chunks, and one that two rows search
    generator = torch.Generator().manual_seed(9)
    queries = torch.randint(-2, 3, (len(stores), 6, 3), generator=generator).float()
    mask = torch.arange(6) >= torch.arange(len(stores))[:, None] % 5
    ranked: list[int] = []
    best = many_stores.best_of_each

    def counted(searched: list[many_stores.Searched], *others: object) -> object:
        ranked.append(len(searched))
        return best(searched, *others)  # type: ignore[arg-type]

    monkeypatch.setattr("mplus.retrievers.linear.best_of_each", counted)
    for k in (0, 1, 6, 50, 1000):
        together = retriever.select(0, queries, mask, stores, k)
        assert ranked.pop() == len(stores) - 1, "the empty one has nothing to rank"
        monkeypatch.setattr(many_stores, "SMALL", 0)  # so that each is ranked as a large store is
        for row, found in enumerate(together):
            (alone,) = retriever.select(0, queries[row : row + 1], mask[row : row + 1], stores[row : row + 1], k)
            assert torch.equal(found.ids, alone.ids)
            assert torch.equal(found.scores, alone.scores)
        monkeypatch.undo()
        monkeypatch.setattr("mplus.retrievers.linear.best_of_each", counted)
        ranked.clear()


def test_large_stores_are_ranked_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    retriever = LinearRetriever(RetrieverShape(layers=1, hidden_size=4), LinearRetriever.Options(width=3))
    queries, mask, stores = torch.ones(2, 3, 3), torch.ones(2, 3, dtype=torch.bool), [store(200, 1), store(200, 2)]
    together = retriever.select(0, queries, mask, stores, 4)
    monkeypatch.setattr(many_stores, "SMALL", 100)
    monkeypatch.setattr("mplus.retrievers.linear.best_of_each", lambda searched, *_: [None for _ in searched])
    alone = retriever.select(0, queries, mask, stores, 4)
    assert [one.ids.tolist() for one in alone] == [one.ids.tolist() for one in together]
