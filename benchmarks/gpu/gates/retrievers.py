"""Gates of the retrievers: what they pick on the device is what they pick on the CPU, but for ties within rounding."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from attrs import evolve
from torch import Tensor

from benchmarks.gpu.gates.kernels import SIGMOID
from benchmarks.gpu.session import Gate, Session
from mplus.config import JsonValue, MPlusConfig
from mplus.retrievers.base import Retriever, RetrieverShape
from mplus.retrievers.build import build_retriever
from mplus.stores.base import MemoryStore, StoreLayout
from mplus.stores.ram import RamStore
from mplus.testing.drawing import draw_rows
from mplus.testing.projections import SmallAttention
from mplus.testing.rounding import allowed, error

SHAPE = RetrieverShape(layers=1, hidden_size=48)
TEXTS, TOKENS, WANTED = 3, 19, 50
RETRIEVERS_TRIED: Mapping[str, dict[str, JsonValue]] = {
    "linear, mean_dot": {"name": "linear", "width": 32},
    "linear, sigmoid_mean": {"name": "linear", "width": 32, "score": "sigmoid_mean"},
    "centroid": {"name": "centroid", "width": 32, "score": "sigmoid_mean"},
    "attention": {"name": "attention"},
}
INDEXED: Mapping[str, dict[str, JsonValue]] = {
    "faiss_ivf": {"name": "faiss_ivf", "width": 32, "least": 500, "cells": 16, "probes": 16},
    "faiss_ivf on the GPU": {"name": "faiss_ivf", "width": 32, "least": 500, "cells": 16, "probes": 16, "gpu": True},
}


def retrievers(session: Session) -> None:
    """Try every retriever that needs no index."""
    for name, table in RETRIEVERS_TRIED.items():
        for dtype in (torch.float32,) if session.few else (torch.float32, torch.bfloat16):
            with session.gate(f"retriever/{name}/{dtype}".replace("torch.", "")) as gate:
                compare(session, gate, table, dtype, 300 if session.few else 3000)


def faiss_on_the_gpu(session: Session) -> None:
    """Try the index of faiss beside rows on the device, on the host and on the GPU where faiss can use one."""
    for name, table in INDEXED.items():
        with session.gate(f"retriever/{name}") as gate:
            compare(session, gate, table, torch.float32, 1200)


@torch.no_grad()
def compare(session: Session, gate: Gate, table: dict[str, JsonValue], dtype: torch.dtype, count: int) -> None:
    """Let one retriever pick rows on the CPU and on the device.

    The scores on the device must be those of float64 within rounding; the rows that it picks must have, on the CPU, the
    scores that it says they have. So rows can only be exchanged where rounding decides.
    """
    torch.manual_seed(5)
    plain = build_retriever(MPlusConfig.from_dict({"retriever": table}), SHAPE)
    plain.attach(SmallAttention(SHAPE))
    there = copy.deepcopy(plain).to(session.device)
    there.attach(SmallAttention(SHAPE))
    hidden = torch.randn(TEXTS, TOKENS, SHAPE.hidden_size, generator=torch.Generator().manual_seed(2))
    mask = torch.ones(TEXTS, TOKENS, dtype=torch.bool)
    mask[1, :4] = False
    store, moved = fill(plain, dtype, count, torch.device("cpu")), fill(plain, dtype, count, session.device)
    queries = plain.project_queries(0, hidden)
    every = plain.select(0, queries, mask, [store] * TEXTS, count)
    best = plain.select(0, queries, mask, [store] * TEXTS, WANTED)
    asked = there.project_queries(0, hidden.to(session.device)), mask.to(session.device)
    found = there.select(0, *asked, [moved] * TEXTS, WANTED)
    exact = exact_scores(plain, queries, mask, store)
    for text in range(TEXTS):
        known = dict(zip(every[text].ids.tolist(), every[text].scores, strict=True))
        ids, scores = found[text].ids.tolist(), found[text].scores.cpu()
        gate.holds(len(set(ids)) == WANTED, "a row comes twice, or too few come")
        own = torch.stack([known[one] for one in ids])  # what these rows have on the CPU
        approximate = table.get("score") == "sigmoid_mean" and session.device.type == "cuda"
        tolerance = allowance(every[text].scores, exact, text) + (SIGMOID if approximate else 0.0)
        gate.error, gate.allowed = error(scores, own), tolerance
        gate.holds(gate.error <= tolerance, f"scores differ by {gate.error:.3g}, allowed are {tolerance:.3g}")
        left = error(own.sort(descending=True).values, best[text].scores.sort(descending=True).values)
        gate.holds(left <= 2 * tolerance, f"rows that are better by {left:.3g} were left out")


def exact_scores(retriever: Retriever, queries: Tensor, mask: Tensor, store: MemoryStore) -> Tensor | None:
    """Score all rows in float64; None: the retriever has no score of its own."""
    keys = store.keys(0)
    if keys is None or type(retriever).score is Retriever.score:
        return None
    return retriever.score(0, queries.double(), mask, keys.double().expand(TEXTS, -1, -1))


def allowance(scores: Tensor, exact: Tensor | None, text: int) -> float:
    """Return how far scores of two computations may be apart: by what float32 is off from float64 on the CPU."""
    if exact is None:  # no score of its own: a few units of the last place of the largest
        return 64 * torch.finfo(torch.float32).eps * float(scores.abs().max())
    truth = exact[text].sort(descending=True).values
    return 2 * allowed(scores.sort(descending=True).values, truth[: len(scores)])


def fill(retriever: Retriever, dtype: torch.dtype, count: int, device: torch.device) -> MemoryStore:
    """Return a store on a device with rows whose keys were projected on the CPU."""
    layout = StoreLayout(layers=1, hidden_size=SHAPE.hidden_size, key_size=retriever.key_size, dtype=dtype)
    rows = draw_rows(evolve(layout, key_size=0, dtype=torch.float32), count, 1)
    key = retriever.project_keys(0, rows.need_hidden())
    rows = rows.replace(hidden=rows.need_hidden().to(dtype), key=None if key is None else key.to(dtype))
    store = RamStore(evolve(layout, device=device))
    store.append(0, rows.to(device))
    return store
