"""Retrieval from an index against scoring every row: time and recall.

    python -m benchmarks.speed.retrieval keys KEYS     # writes a file of keys, some minutes
    python -m benchmarks.speed.retrieval sweep KEYS    # writes records/retrieval-sweep.json
    python -m benchmarks.speed.retrieval speed KEYS    # writes records/retrieval-speed.json

Keys are those of one layer of recall-tiny (``benchmarks.speed.distinct_facts``). Both sides rank by the score
"mean_dot" of the same queries, one text at a time; times are taken in turns. What an index costs in answers:
``benchmarks.quality.retrieval``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import faiss
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.records import record_path, write
from benchmarks.speed.distinct_facts import Asked, write_and_ask
from mplus.environment import load_average, run_info
from mplus.hf.pretrained.shipped import load_recall
from mplus.retrievers.base import RetrieverShape
from mplus.retrievers.faiss_ivf import FaissIvfRetriever
from mplus.retrievers.ivf import POINTS_PER_CELL, IvfIndex
from mplus.retrievers.linear import LinearRetriever
from mplus.rows import MemoryRows
from mplus.stores.base import StoreLayout
from mplus.stores.ram import RamStore
from mplus.timing import Arm, Summary, in_rounds, ratio, summary

Selector = Callable[[Tensor, int], Any]
"""``select(queries [T, r], k)``: the best rows for one text."""
COUNTS = (100_000, 300_000, 1_000_000, 2_000_000)
WANTED = (16, 256, 2560)
LAYER, MEMORIES, CHUNKS, QUESTIONS = 1, 128, 4096, 256


def save_keys(path: Path) -> None:
    """Write all the text, and keep keys and queries."""
    asked = write_and_ask(load_recall()[0], LAYER, MEMORIES, CHUNKS, QUESTIONS)
    facts = {**asked.facts, "circumstances": run_info(model="recall-tiny")}
    save_file({"keys": asked.keys, "queries": asked.queries.contiguous()}, path, {"facts": json.dumps(facts)})


def load_keys(path: Path) -> Asked:
    """Read what ``save_keys`` wrote."""
    with safe_open(path, "pt") as file:
        return Asked(file.get_tensor("keys"), file.get_tensor("queries"), json.loads(file.metadata()["facts"]))


def stored(keys: Tensor) -> RamStore:
    """Return a store of one layer with these keys."""
    store = RamStore(StoreLayout(layers=1, hidden_size=1, keeps_hidden=False, key_size=keys.shape[1]))
    for part in keys.split(2**16):
        numbers = torch.arange(len(part))
        store.append(0, MemoryRows(None, numbers, torch.zeros_like(numbers), key=part))
    return store


def sweep(asked: Asked, rounds: int) -> dict[str, Any]:
    """Measure recall and time for several numbers of cells and of cells searched, over all keys."""
    torch.set_num_threads(1)
    queries, count = asked.queries.mean(1)[:rounds], len(asked.keys)
    best = [(asked.keys @ query).topk(max(WANTED)).indices for query in queries]
    found = {}
    for cells in (1024, 2048, 4096):
        begun = time.perf_counter()
        sample = min(count, POINTS_PER_CELL * cells)
        index = IvfIndex.train(asked.keys[torch.arange(sample) * count // sample], cells, count)
        trained = time.perf_counter()
        index.add(torch.arange(count), asked.keys)
        facts: dict[str, Any] = {"train_s": trained - begun, "add_s": time.perf_counter() - trained}
        for share in (256, 128, 64, 32, 16):
            facts[f"1/{share}"] = {
                str(k): _searched(index, queries, [one[:k] for one in best], cells // share) for k in WANTED
            }
        found[str(cells)] = facts
        print(cells, json.dumps(facts), flush=True)
    return {"cells": found, "queries": rounds, "threads": 1, "keys": asked.facts}


def _searched(index: IvfIndex, queries: Tensor, best: Sequence[Tensor], probes: int) -> dict[str, float]:
    shares, seconds = [], []
    for query, rows in zip(queries, best, strict=True):
        begun = time.perf_counter()
        ids = index.search(query, len(rows), probes)
        seconds.append(time.perf_counter() - begun)
        shares.append(float(torch.isin(rows, ids).float().mean()))
    return {
        "ms": round(1000 * statistics.median(seconds), 3),
        "recall": round(statistics.mean(shares), 4),
        "lowest": round(min(shares), 4),
    }


def speed(asked: Asked, threads: Sequence[int], rounds: int) -> dict[str, Any]:
    """Time a selection by ``faiss_ivf`` against exact ones, for several numbers of rows and of rows wanted."""
    by_rows = {}
    for count in COUNTS:
        if count <= len(asked.keys):
            by_rows[str(count)] = _speed(asked.keys[:count], asked.queries, threads, rounds)
            print(count, json.dumps(by_rows[str(count)]), flush=True)
    return {"by_rows": by_rows, "rounds": rounds, "keys": asked.facts}


def _speed(keys: Tensor, queries: Tensor, threads: Sequence[int], rounds: int) -> dict[str, Any]:
    shape, width = RetrieverShape(layers=1, hidden_size=1), keys.shape[1]
    linear = LinearRetriever(shape, LinearRetriever.Options(width=width))
    indexed = FaissIvfRetriever(shape, FaissIvfRetriever.Options(width=width))
    store, mask = stored(keys), torch.ones(1, queries.shape[1], dtype=torch.bool)
    flat = faiss.IndexFlatIP(width)
    flat.add(keys.numpy())
    torch.set_num_threads(max(threads))
    begun = time.perf_counter()
    indexed.select(0, queries[:1], mask, [store], 1)
    facts: dict[str, Any] = {"build_s": round(time.perf_counter() - begun, 1), **indexed.index_facts(0, store)}
    view = store.snapshot()
    selectors: dict[str, Selector] = {
        "torch": lambda query, k: (keys @ query.mean(0)).topk(k),
        "faiss_flat": lambda query, k: flat.search(query.mean(0)[None].numpy(), k),
        "linear": lambda query, k: linear.select(0, query[None], mask, [view], k),
        "faiss_ivf": lambda query, k: indexed.select(0, query[None], mask, [view], k),
    }
    for number in threads:
        torch.set_num_threads(number)
        faiss.omp_set_num_threads(number)
        load, by_wanted = load_average(), {}
        for k in WANTED:
            by_wanted[str(k)] = {
                **_timed(selectors, queries, k, rounds),
                **_recall(indexed, keys, queries[: rounds + 1], mask, view, k),
            }
        facts[f"{number} threads"] = {"load_average": [load, load_average()], "by_wanted": by_wanted}
    torch.set_num_threads(1)
    facts["update"] = _update(indexed, store, queries[:1], mask, rounds)
    return facts


def _timed(selectors: Mapping[str, Selector], queries: Tensor, k: int, rounds: int) -> dict[str, Any]:
    """Time every variant, and the index against the faster exact one of torch and faiss."""

    def arm(name: str, select: Selector) -> Arm:
        return Arm(name, lambda number: select(queries[number], k))

    times = in_rounds([arm(*item) for item in selectors.items()], rounds, queries.device)
    fastest = min(("torch", "faiss_flat"), key=lambda name: statistics.median(times[name]))
    return {
        **{name: summary(taken) for name, taken in times.items()},
        "fastest_exact": fastest,
        "times_as_fast": ratio(times, fastest, "faiss_ivf"),
    }


def _recall(
    indexed: FaissIvfRetriever, keys: Tensor, queries: Tensor, mask: Tensor, view: Any, k: int
) -> dict[str, float]:
    shares = []
    for query in queries:
        best = (keys @ query.mean(0)).topk(k).indices
        (found,) = indexed.select(0, query[None], mask, [view], k)
        shares.append(float(torch.isin(best, found.ids).float().mean()))
    return {"recall": round(statistics.mean(shares), 4), "lowest_recall": round(min(shares), 4)}


def _update(indexed: FaissIvfRetriever, store: RamStore, query: Tensor, mask: Tensor, rounds: int) -> Summary:
    """Time a selection after 256 rows came and as many left, which the index has to follow first."""
    rows = store.gather(0, store.ids(0)[:256])
    seconds = []
    for _ in range(min(rounds, 8)):
        store.append(0, rows)
        store.remove(0, store.ids(0)[:256])
        store.ids(0)  # joined once after a change, by whoever reads first
        begun = time.perf_counter()
        indexed.select(0, query, mask, [store], 16)
        seconds.append(time.perf_counter() - begun)
    return summary(seconds)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["keys", "sweep", "speed"])
    parser.add_argument("keys", type=Path, help="file of keys")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=24, help="queries timed")
    parser.add_argument("--record", type=Path, help="default: records/retrieval-WHAT.json")
    given = parser.parse_args()
    if given.what == "keys":
        save_keys(given.keys)
        return
    asked = load_keys(given.keys)
    found = sweep(asked, given.rounds) if given.what == "sweep" else speed(asked, given.threads, given.rounds)
    record = given.record or record_path("speed", f"retrieval-{given.what}")
    write(record, {**found, "circumstances": run_info(model="recall-tiny")})


if __name__ == "__main__":
    main()
