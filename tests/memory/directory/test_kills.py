"""A process that is killed while it writes: what it was told is written is there, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mplus.memory import Memory
from tests.conftest import NIGHTLY
from tests.memory.disks.plain import CONFIGS, PlainModel, chunk, reopened
from tests.memory.tiny import content, difference

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[3]
AT_RANDOM, AT_CALLS = (120, range(1, 121)) if NIGHTLY else (10, range(3, 43, 4))


class Expected:
    """What a memory holds after so many chunks, written by one that was never interrupted."""

    def __init__(self, model: PlainModel) -> None:
        self.memory = model.new_memory()
        self.contents = [content(self.memory)]

    def after(self, chunks: int) -> dict:
        while len(self.contents) <= chunks:
            number = len(self.contents) - 1
            self.memory.write(chunk(number), source=f"{number % 3}")
            self.contents.append(content(self.memory))
        return self.contents[chunks]


@pytest.fixture(scope="module")
def writer() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.memory.disks.writer"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.stdin.close()


def killed(writer: subprocess.Popen[str], folder: Path, store: str, at: int, draw: random.Random) -> int:
    """Let a process write until it is killed; returns how many chunks were acknowledged."""
    writer.stdin.write(f"{folder} {at} {store}\n")
    writer.stdin.flush()
    acknowledged, pid, left = 0, None, draw.randint(0, 5)
    while (line := writer.stdout.readline().split()) != ["dead"]:
        assert line, "the writer lives on"
        if line[0] == "pid":
            pid = int(line[1])
        elif line[0] == "acknowledged":
            acknowledged = int(line[1])
            left -= 1
        if not at and pid and left < 0:  # between two chunks, or anywhere within one
            time.sleep(draw.random() * 0.01)
            os.kill(pid, signal.SIGKILL)
            left, pid = 10**9, None
    return acknowledged


@pytest.mark.parametrize("store", CONFIGS)
def test_kill(writer, tmp_path, record_property, store):
    model = PlainModel(**CONFIGS[store])
    expected, draw = Expected(model), random.Random(0)
    folder, kills, last = tmp_path / "memory", 0, 0
    share = slice(None, None, 1 if NIGHTLY or store == "mmap" else 4)
    ends = ([0] * AT_RANDOM + list(AT_CALLS))[share]
    for at in ends:
        acknowledged = max(last, killed(writer, folder, store, at, draw))
        kills += 1
        if not (folder / "manifest.json").exists():
            assert acknowledged == 0
            continue
        found = content(reopened(folder, model))
        last = found["0.clock"] // 4
        assert acknowledged <= last <= acknowledged + 1
        assert difference(found, expected.after(last)) == []
    record_property("kills", kills)
    assert kills >= len(range(200 if NIGHTLY else 20)[share])
    assert last > kills / 2
    with Memory.open(folder, model) as memory:
        memory.write(chunk(last), source=f"{last % 3}")
        assert difference(content(memory), expected.after(last + 1)) == []
