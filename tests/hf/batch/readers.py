"""Tiny wrapped decoders of every mechanism that batch readers are tested with, and memories of theirs."""

from __future__ import annotations

import functools
from typing import Any

import mplus
from benchmarks.quality.architectures.decoders import BY_NAME
from tests.memory.tiny import build, ids, variant

SIZES = {"chunk_tokens": 16, "long_term_tokens": 200, "retrieved_tokens": 32}
EVERY = {"name": "kv", "retrieved_chunks": None, "min_score": -1.0}


@functools.cache
def wrapped(mechanism: str) -> Any:
    """The decoder of a mechanism, shared between tests, which must not change it."""
    if mechanism == "foreign":
        return build(seed=3).eval()
    if mechanism == "kv":
        return mplus.wrap(BY_NAME["llama"].build(0), {"mechanism": EVERY, **SIZES}).eval()
    return variant("paper" if mechanism == "mplus" else mechanism).eval()


def fresh() -> Any:
    """A decoder of M+ that a test may change."""
    return build().eval()


def memories(model: Any, sizes: tuple[int, ...] = (0, 100, 190)) -> list[Any]:
    """Memories of so many tokens, with one source each."""
    made = []
    for seed, size in enumerate(sizes):
        memory = model.new_memory(seed=seed)
        if size:
            memory.write(ids(size, seed=50 + seed), source=f"source {seed}")
        made.append(memory)
    return made
