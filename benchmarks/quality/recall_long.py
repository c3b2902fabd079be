"""Facts told thousands of chunks ago, with the number of attended rows unchanged.

    python -m benchmarks.quality.recall_long mplus/data/recall-tiny      # writes records/recall-long.json
    python -m benchmarks.quality.recall_long runs/recall-long/model --chunks 20000

The decoder is one that was trained by recall-tiny or recall-long; only the capacity of long-term memory is raised, so
that nothing is evicted.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import mplus
from benchmarks.records import load, record_path, write
from mplus.environment import run_info
from mplus.evaluation.execution import ParallelStreams
from mplus.evaluation.options import ArmOptions
from mplus.evaluation.retention import retention
from mplus.evaluation.tasks.facts import Facts

RECORD = record_path("quality", "recall-long")
AGES = (0, 8, 64, 128, 256, 500, 1000, 1500, 2000, 5000, 10_000, 20_000)
ARMS = ["memoryllm", "mplus", "mplus-random", "mplus-oracle"]


def measure(model: Any, chunks: int, streams: int, rounds: int) -> dict[str, Any]:
    """Measure retention up to an age of ``chunks``."""
    ages = tuple(age for age in AGES if age <= chunks)
    task = Facts(ages=ages, streams=streams, rounds=rounds, seed=11)
    rows = task.passages * model.mplus_config.memory_tokens_per_chunk
    begun = time.perf_counter()
    report = retention(ParallelStreams(model, task, long_term_tokens=rows), ArmOptions(arms=ARMS))
    return {"retention": report.plain(), "long_term_rows": rows, "seconds": round(time.perf_counter() - begun, 1)}


def main() -> None:
    """Run from the command line; another number of chunks is added to the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--chunks", type=int, default=2000)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=8)
    given = parser.parse_args()
    record: dict[str, Any] = {"measured": {}}
    if RECORD.exists():
        record = load("quality", "recall-long")
    found = measure(mplus.from_pretrained(given.model).eval(), given.chunks, given.streams, given.rounds)
    record["measured"][str(given.chunks)] = found
    record.update(model=given.model.name, circumstances=run_info())
    write(RECORD, record)
    accuracies = {arm["name"]: arm["accuracy_by_age"] for arm in found["retention"]["arms"]}
    print(json.dumps(accuracies, indent=1))


if __name__ == "__main__":
    main()
