"""How fast a memory that lives in files opens, and how fast its rows are read from them beside rows in memory.

    python -m benchmarks.speed.mapped_files                   # writes records/mapped_files.json
    python -m benchmarks.speed.mapped_files --gigabytes 0.05 --layers 4 --record small.json

A row is what Llama-3.1-8B keeps of one: keys and values of 8 heads of 128 numbers, a retriever key of 256, in bfloat16.
Rows are drawn, and the decoder that the memory belongs to is narrow, since it never reads. With few layers each is
long, and rows read from it lie far apart; with 32, as in that decoder, short-term memory, which an opening reads whole,
is a large part.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from attrs import define, evolve, field
from torch import Tensor

import mplus
from benchmarks.records import record_path, write
from mplus.bench.presets import PRESETS
from mplus.config import Component, JsonValue, MPlusConfig
from mplus.environment import load_average, run_info
from mplus.hf.decoders.bench_models import random_llama
from mplus.mechanisms.short_term.state import ShortTermState
from mplus.memory import Memory
from mplus.memory.directory import JOURNAL_BYTES
from mplus.memory.state import StreamState
from mplus.rows import NO_SOURCE, MemoryRows
from mplus.stores import STORES
from mplus.stores.base import StoreLayout
from mplus.timing import Arm, in_rounds, median, summary

RECORD = record_path("speed", "mapped_files")
SHAPE = PRESETS["llama3-8b"]
CPU = torch.device("cpu")
HIDDEN_SIZE = 256
PIECE = 4096
"""Rows drawn or copied at a time."""


def decoder(layers: int, short_term: int, seed: int) -> Any:
    """Wrap a narrow decoder with the heads of ``SHAPE``, with a memory whose long-term rows have no limit."""
    shape = evolve(SHAPE, layers=layers, hidden_size=HIDDEN_SIZE, intermediate_size=HIDDEN_SIZE, vocab_size=512)
    retriever: dict[str, JsonValue] = {"name": "linear", "width": SHAPE.retriever_width}
    memory = {**shape.memory, "retriever": retriever, "memory_rows": "projected", "short_term_tokens": short_term}
    base = random_llama(shape.fields, torch.bfloat16, CPU, seed)
    return mplus.wrap(base, MPlusConfig.from_dict(memory), check=False)


def drawn(layout: StoreLayout, births: Tensor, generator: torch.Generator) -> MemoryRows:
    """Draw a row for every birth."""
    columns = {"birth": births, "source": torch.full_like(births, NO_SOURCE)}
    for name in layout.columns().keys() - columns.keys():
        shape, dtype = layout.columns()[name]
        columns[name] = torch.empty(len(births), *shape, dtype=dtype)
        for piece in columns[name].split(PIECE):
            piece.copy_(torch.randn(piece.shape, generator=generator))
    return MemoryRows.of(columns)


def fill(memory: Memory, long_term: int, short_term: int, generator: torch.Generator) -> None:
    """Draw so many rows in every layer, as many at a time as a journal takes before the next checkpoint.

    By ``Streams.change``, which makes a change of any kind and puts it on disk: the methods of ``Memory``, of which
    ``write`` alone adds rows, would have the decoder read thousands of chunks.
    """
    (store,) = memory.stores
    layout, places = store.layout, torch.arange(long_term + short_term)
    step = max(1, JOURNAL_BYTES // (layout.row_bytes * layout.layers))
    *parts, last = places[:long_term].split(step)

    def append(births: Tensor) -> None:
        for layer in range(layout.layers):
            memory.stores[0].append(layer, drawn(layout, births, generator))

    def finish(states: list[StreamState]) -> None:
        append(last)
        stm = tuple(drawn(layout, places[long_term:], generator) for _ in range(layout.layers))
        count = memory.engine.config.memory_tokens_per_chunk
        newest = tuple(torch.ones(count, layout.hidden_size, dtype=layout.dtype) for _ in stm)
        state = cast("ShortTermState", states[0])
        states[0] = evolve(state, stm=stm, newest=newest, clock=len(places))

    for births in parts:
        memory.streams.change(lambda _, births=births: append(births))  # type: ignore[misc]
    memory.streams.change(finish)


def files(folder: Path) -> Iterator[tuple[str, int]]:
    """Read every file in ``folder``, so that the page cache has it; yield names and bytes on disk."""
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            while file.read(2**24):
                pass
        yield path.name, path.stat().st_blocks * 512


@define(eq=False)
class Opening:
    """A memory that is opened again and again; the last one opened is held."""

    folder: Path
    model: Any
    held: list[Memory] = field(factory=list)

    def open(self, *, read_only: bool) -> Memory:
        """Open the memory and hold it."""
        self.held.append(Memory.open(self.folder, self.model, read_only=read_only))
        return self.held[-1]

    def close(self) -> None:
        """Close what is held."""
        while self.held:
            self.held.pop().close()

    def arms(self) -> list[Arm]:
        """Return the arms: opened for reading, and for writing."""
        return [
            Arm("read_only", lambda turn: self.open(read_only=True), lambda turn: self.close()),
            Arm("writing", lambda turn: self.open(read_only=False), lambda turn: self.close()),
        ]


@define(eq=False)
class Reading:
    """Reads of random rows of one layer: from ``ram``, from files just opened, and from files that were read before.

    Every reading asks for rows of its own, in ascending order as a decoder does, so that none finds what another has
    left in the caches of the processor.

    Attributes:
        opening: of the memory.
        layer: that is read.
        rows: at a time.
        generator: draws them.
        kept: the files that were read before.
        twin: the same rows in a store ``ram``.
    """

    opening: Opening
    layer: int
    rows: int
    generator: torch.Generator
    kept: Any = field(init=False)
    twin: Any = field(init=False)
    _fresh: Any = None
    _wanted: Tensor = field(factory=lambda: torch.empty(0, dtype=torch.int64))

    def __attrs_post_init__(self) -> None:
        memory = Memory.open(self.opening.folder, self.opening.model, read_only=True)
        (self.kept,) = memory.stores
        self.twin = STORES.build(Component.of("ram"), evolve(self.kept.layout, layers=1))
        for ids in self.kept.ids(self.layer).split(PIECE):
            self.twin.append(0, self.kept.gather(self.layer, ids))

    def check(self) -> None:
        """Raise SystemExit unless files and memory give the same rows."""
        self.draw()
        self.reopen()
        stores = ((self.kept, self.layer), (self._fresh, self.layer), (self.twin, 0))
        kept, fresh, twin = (store.gather(layer, self._wanted).columns() for store, layer in stores)
        for name, column in twin.items():
            if not torch.equal(kept[name], column) or not torch.equal(fresh[name], column):
                raise SystemExit(f"column {name!r} must be the same in files and in memory, and is not")

    def draw(self) -> None:
        """Choose rows; their ids count from 0 in both stores."""
        chosen = torch.randperm(self.kept.count(self.layer), generator=self.generator)[: self.rows]
        self._wanted = chosen.sort().values

    def reopen(self) -> None:
        """Open the memory anew, so that nothing of it was read, and choose rows."""
        self.draw()
        self._fresh = None
        self.opening.close()
        (self._fresh,) = self.opening.open(read_only=True).stores

    def arms(self) -> list[Arm]:
        """Return an arm for each of the three."""
        return [
            Arm("ram", lambda turn: self.twin.gather(0, self._wanted), lambda turn: self.draw()),
            Arm("first", lambda turn: self._fresh.gather(self.layer, self._wanted), lambda turn: self.reopen()),
            Arm("after", lambda turn: self.kept.gather(self.layer, self._wanted), lambda turn: self.draw()),
        ]


@torch.no_grad()
def measure(gigabytes: float, layers: int, rounds: int, folder: Path, seed: int) -> dict[str, Any]:
    """Fill a memory in ``folder``, open it, and read from it."""
    begun, load = time.perf_counter(), load_average()
    row_bytes = 2 * (2 * SHAPE.key_heads * SHAPE.head_dim + SHAPE.retriever_width) + 16
    rows = int(gigabytes * 1e9 / layers / (row_bytes + 8))
    short_term = min(SHAPE.short_term_tokens, rows // 2)
    with Memory.open(folder, decoder(layers, short_term, seed), seed=seed) as memory:
        fill(memory, rows - short_term, short_term, torch.Generator().manual_seed(seed))
        if memory.stores[0].layout.row_bytes != row_bytes:
            raise SystemExit(f"a row must take {row_bytes} bytes, got {memory.stores[0].layout.row_bytes}")
    del memory
    sizes, filling = dict(files(folder)), time.perf_counter() - begun
    sys.stderr.write(f"{layers} layers: filled in {filling:.0f} s\n")
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    opening = Opening(folder, decoder(layers, short_term, seed))
    start = time.perf_counter()
    opening.open(read_only=True)
    first = time.perf_counter() - start
    opened = in_rounds(opening.arms(), rounds, CPU, warm=0)
    wanted = min(SHAPE.retrieved_tokens, rows - short_term)
    reading = Reading(opening, layers // 2, wanted, torch.Generator().manual_seed(seed))
    reading.check()
    read = in_rounds(reading.arms(), rounds, CPU)
    opening.close()
    return {
        "layers": layers,
        "disk_bytes": sum(sizes.values()),
        "files": sizes,
        "row_bytes": row_bytes,
        "short_term_rows": short_term,
        "long_term_rows": rows - short_term,
        "filling_seconds": round(filling, 1),
        "opening": {"first_ms": round(1000 * first, 4), **{name: summary(times) for name, times in opened.items()}},
        "reading": {
            "rows": reading.rows,
            "layer": reading.layer,
            **{name: summary(times) for name, times in read.items()},
            "first_over_ram": round(median(read["first"]) / median(read["ram"]), 4),
            "after_over_ram": round(median(read["after"]) / median(read["ram"]), 4),
        },
        "faults_that_read_the_disk": resource.getrusage(resource.RUSAGE_SELF).ru_majflt - faults,
        "load_average": [load, load_average()],
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of a memory on disk")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 32], help="a memory is made for each number")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--directory", type=Path, help="where the memories are, as long as they are measured")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, default=RECORD)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    found = []
    for layers in given.layers:
        with tempfile.TemporaryDirectory(dir=given.directory) as folder:
            found.append(measure(given.gigabytes, layers, given.rounds, Path(folder), given.seed))
    record = {
        "gigabytes": given.gigabytes,
        "rounds": given.rounds,
        "memories": found,
        "circumstances": run_info(),
    }
    write(given.record, record)
    sys.stdout.write(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
