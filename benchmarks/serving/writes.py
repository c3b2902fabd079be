"""Writes to many memories in directories: 32 of one chunk, together and one after the other, and what syncing takes.

python -m benchmarks.serving.writes                   # writes records/writes.json
python -m benchmarks.serving.writes --folder /data    # memories on that disk; the temporary folder else
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import mplus
from benchmarks.records import record_path, write
from mplus.environment import load_average, run_info
from mplus.hf.pretrained.shipped import chapters, load_decoder, load_tokenizer
from mplus.memory import Memory
from mplus.timing import Arm, in_rounds, ratio, summary

MEMORIES, THREADS = 32, 8


def main() -> int:
    """Measure, write the record and print it; return 1 where both ways leave different memories."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", help="where the memories are")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=given.folder) as made:
        found = measure(Path(made), given.rounds)
    record = {**run_info(), "load_average": load_average(), "rounds": given.rounds, "memories": MEMORIES, **found}
    write(record_path("serving", "writes"), record)
    print(json.dumps(record, indent=1))
    return 0 if found["equal"] else 1


def measure(folder: Path, rounds: int) -> dict[str, Any]:
    """Return times of a round of one-chunk writes, and of appending and syncing as many files."""
    model = mplus.wrap(load_decoder(), mplus.MPlusConfig())
    tokenizer, size = load_tokenizer(), model.mplus_engine.config.chunk_tokens
    novel = tokenizer("".join(chapter.text for chapter in chapters()), add_special_tokens=False)["input_ids"]
    ids = torch.tensor(novel)
    ways = {
        way: [Memory.open(folder / way / str(user), model, tokenizer=tokenizer) for user in range(MEMORIES)]
        for way in ("together", "one by one")
    }

    def chunks(number: int) -> list[torch.Tensor]:
        starts = [(number * MEMORIES + user) * size % (len(ids) - size) for user in range(MEMORIES)]
        return [ids[start : start + size] for start in starts]

    def together(number: int) -> None:
        mplus.write_together(ways["together"], chunks(number), [f"{number}"] * MEMORIES, progress=False)

    def one_by_one(number: int) -> None:
        for memory, chunk in zip(ways["one by one"], chunks(number), strict=True):
            memory.write(chunk, source=f"{number}", progress=False)

    spent: list[float] = []

    def counted(work: Callable[[int], None]) -> Callable[[int], None]:
        def run(number: int) -> None:
            begun = time.process_time()
            work(number)
            spent.append(time.process_time() - begun)

        return run

    times = in_rounds(
        [
            Arm("together", counted(together)),
            Arm("one by one", one_by_one),
            Arm("sync, 1 thread", lambda number: synced(folder / "files", 1)),
            Arm("sync, 8 threads", lambda number: synced(folder / "files", THREADS)),
        ],
        rounds,
        torch.device("cpu"),
    )
    pairs = zip(ways["together"], ways["one by one"], strict=True)
    equal = all(same(one, other) for one, other in pairs)
    for memory in (*ways["together"], *ways["one by one"]):
        memory.close()
    return {
        "chunk_tokens": size,
        "equal": equal,
        "arms": {name: summary(seconds) for name, seconds in times.items()},
        "together_cpu": summary(spent[-rounds:]),
        "ratios": {"one by one / together": ratio(times, "one by one", "together")},
    }


def same(one: Memory, other: Memory) -> bool:
    """Return True if two memories hold rows of the same texts, as far as rounding lets them be equal."""
    pairs = zip(one.snapshot(), other.snapshot(), strict=True)
    rows = [(a.store.gather(0, a.store.ids(0)), b.store.gather(0, b.store.ids(0))) for a, b in pairs]
    return one.nbytes == other.nbytes and all(torch.equal(a.birth, b.birth) for a, b in rows)


def synced(folder: Path, threads: int) -> None:
    """Append a record to each of as many files as there are memories, and sync them in so many threads."""
    folder.mkdir(exist_ok=True)
    handles = [os.open(folder / str(user), os.O_CREAT | os.O_WRONLY | os.O_APPEND) for user in range(MEMORIES)]
    try:
        for handle in handles:
            os.write(handle, bytes(8192))
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(os.fsync, handles))
    finally:
        for handle in handles:
            os.close(handle)


if __name__ == "__main__":
    raise SystemExit(main())
