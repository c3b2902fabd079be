"""A process that forks a writer for every line it reads: ``folder call store``, call 0: only its parent kills it.

Torch is imported once; each fork opens the directory, says ``ready``, and writes one chunk after the other, saying how
many of them were acknowledged, until it is killed. Its process id comes first.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from mplus.stores.disk.files import FileSystem
from tests.memory.disks.disks import Deadly, open_memory
from tests.memory.disks.plain import CONFIGS, PlainModel, chunk


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def write(folder: Path, model: PlainModel, at: int) -> None:
    """Write chunks, from the first that is not there yet, for ever."""
    memory = open_memory(folder, model, journal_bytes=30_000, files=Deadly(at) if at else FileSystem())
    number = memory.states[0].clock // 4
    say("ready")
    while True:
        memory.write(chunk(number), source=f"{number % 3}")
        number += 1
        say(f"acknowledged {number}")


def main() -> None:
    torch.set_num_threads(1)
    models = {store: PlainModel(**config) for store, config in CONFIGS.items()}
    for line in sys.stdin:
        folder, at, store = line.split()
        child = os.fork()
        if child == 0:
            try:
                write(Path(folder), models[store], int(at))
            finally:
                os._exit(1)
        say(f"pid {child}")
        os.waitpid(child, 0)
        say("dead")


if __name__ == "__main__":
    main()
