"""Measure every architecture against the oracle.

python -m benchmarks.quality.architectures.measure    # adds this version of transformers to records/architectures.json
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import __version__ as transformers_version

import mplus
from benchmarks.quality.architectures import comparisons
from benchmarks.quality.architectures.decoders import ARCHITECTURES, Architecture
from benchmarks.quality.architectures.retrofitted import CHUNK, K, config_for, retrofit
from benchmarks.records import load, record_path, write
from mplus.environment import run_info
from mplus.errors import NotSupported

COLUMNS = ("read", "retrieve", "step", "write", "rows")


def measure(architecture: Architecture) -> dict[str, Any]:
    """Return the errors of one architecture, the worst over attention implementations and, for writes, chunk sizes."""
    if architecture.refused is not None:
        try:
            mplus.wrap(architecture.build(), config_for(architecture))
        except NotSupported as reason:
            return {"refused": str(reason)}
        raise SystemExit(f"{architecture.name} should have been refused")
    row: dict[str, Any] = {"moved": None, **dict.fromkeys(COLUMNS), "generate": [], "implementations": []}
    for implementation in architecture.implementations:
        pair = retrofit(architecture, implementation)
        found = pair.wrapped.mplus_engine.retrofit
        row["technique"] = found.technique
        row["positions"] = "offset" if found.positions.offset else found.positions.layout
        row["implementations"].append(implementation)
        projection = pair.wrapped.mplus_engine.projection
        row["hidden_only"] = projection if isinstance(projection, str) else None
        _measure(architecture, pair, row)
    row["generate"] = sorted(set.intersection(*map(set, row["generate"]))) if row["generate"] else None
    return row


def _measure(architecture: Architecture, pair: Any, row: dict[str, Any]) -> None:
    def worst(column: str, value: float) -> None:
        row[column] = value if row[column] is None else max(row[column], value)

    if architecture.hybrid:
        worst("read", comparisons.techniques(pair))
    else:
        found, moved = comparisons.stm_read(pair)
        worst("read", found)
        row["moved"] = round(moved if row["moved"] is None else min(row["moved"], moved), 2)
        pair.forget_longest_sequence()
        worst("retrieve", comparisons.retrieval_read(pair))
        for tokens in (CHUNK, K, K - 1, 1):
            for chunks in (0, 1, 3):
                pair.forget_longest_sequence()
                worst("write", comparisons.write(pair, tokens, chunks))
    if architecture.stable_cache:
        worst("step", comparisons.steps(architecture, pair))
        searches = [search for search in comparisons.SEARCHES if comparisons.generation(pair, search)]
        row["generate"].append(searches)
    if architecture.positions != "offset":
        worst("rows", comparisons.padded_batch(pair))


if __name__ == "__main__":
    with torch.no_grad():
        found = {architecture.name: measure(architecture) for architecture in ARCHITECTURES}
    record = load("quality", "architectures")
    record[transformers_version] = {**run_info(), "rows": found}
    write(record_path("quality", "architectures"), record)
