"""A server on Ray whose engines are killed, and a memory that everybody asks at once.

    python -m benchmarks.serving.ray_owner         # needs mplus[ray]; writes records/ray_owner.json

`mplus serve --ray --engines 2` serves recall-tiny. Then

1. 200 requests about one memory come at once: how many are refused, and how long the slowest takes;
2. ten times, a memory is written, its owner is killed (SIGKILL), and the memory is asked until it answers: how long
   that takes, how many requests are refused meanwhile, and whether everything acknowledged is there. The next round
   begins when Ray has started another engine;
3. a memory that an engine holds is asked of its new owner: how long the hand-over takes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from attrs import define

from benchmarks.records import record_path, write
from mplus.environment import load_average, run_info
from mplus.serving.config import Limits
from mplus.serving.engine.memories.tenants import Tenants
from mplus.serving.http.keys import LOCAL_TENANT
from mplus.serving.messages import MemoryName

FACT = "by the way pet of ada baker owl . so it is and so it was"
QUESTION = {"prompt": "pet of ada baker", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
ENGINE = b"ray::ServeReplica:mplus:engines"
PATIENCE = 120.0
HOT, KILLS = 200, 10


@define(frozen=True)
class RayServer:
    """A server on Ray that runs: its address, and the folder of its memories."""

    address: str
    folder: Path

    def ask(self, path: str, body: Mapping[str, Any] | None = None, method: str | None = None) -> Any:
        """Return the answer to a request. Raises urllib.error.HTTPError: it is refused."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(self.address + path, data, headers, method=method)  # noqa: S310 - http
        with urllib.request.urlopen(request, timeout=PATIENCE) as reply:  # noqa: S310
            return json.loads(reply.read())

    def text(self, memory: str) -> str:
        """Return what a memory answers."""
        answer: str = self.ask("/v1/completions", {**QUESTION, "memory": memory})["choices"][0]["text"]
        return answer

    def owner(self, memory: str) -> int:
        """Return the process that has a memory open."""
        lock = Tenants(self.folder, Limits()).path(MemoryName(LOCAL_TENANT, memory)) / "lock"
        return int(lock.read_bytes().split()[-1])

    def metric(self, name: str) -> float:
        """Return a number of ``/metrics``; 0: it is not there."""
        with urllib.request.urlopen(f"{self.address}/metrics", timeout=PATIENCE) as reply:  # noqa: S310
            lines = [line.split() for line in reply.read().decode().splitlines()]
        return next((float(value) for found, value in filter(_is_pair, lines) if found == name), 0.0)

    def wait_for(self, engines: int) -> None:
        """Wait until so many engines answer."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            if self.metric("mplus_engines") >= engines:
                return
            time.sleep(0.2)
        raise TimeoutError(f"there were fewer than {engines} engines for {PATIENCE:.0f} s")


def _is_pair(words: Sequence[str]) -> bool:
    return len(words) == 2


@contextlib.contextmanager
def serve(folder: Path, *options: str) -> Iterator[RayServer]:
    """Run ``mplus serve --ray`` with recall-tiny, and end it."""
    model = str(files("mplus") / "data" / "recall-tiny")
    command = [sys.executable, "-m", "mplus.cli", "serve", model, "--memories", str(folder), "--port", "0", "--ray"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONUNBUFFERED": "1"}
    log = folder.with_name(f"{folder.name}.log")
    with log.open("w") as said:
        process = subprocess.Popen([*command, *options], stderr=said, stdout=said, env=environment)
    try:
        yield RayServer(_address(log, process), folder)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE)


def _address(log: Path, process: subprocess.Popen[bytes]) -> str:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until and process.poll() is None:
        found = re.search(r"is served at (http://\S+)", log.read_text(encoding="utf-8"))
        if found:
            return found[1]
        time.sleep(0.2)
    raise RuntimeError(f"the server did not start:\n{log.read_text(encoding='utf-8')[-4000:]}")


def engine_processes() -> set[int]:
    """Return the engines of Ray that run on this machine."""
    found = set()
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdecimal() and (folder / "cmdline").read_bytes().startswith(ENGINE):
                found.add(int(folder.name))
    return found


def ask_at_once(server: RayServer, memory: str, count: int) -> dict[str, Any]:
    """Ask one memory so often at once; return how many were refused, and the slowest."""

    def one(_: int) -> tuple[str | None, float]:
        begun = time.perf_counter()
        try:
            text: str | None = server.text(memory)
        except (urllib.error.HTTPError, OSError):
            text = None
        return text, time.perf_counter() - begun

    alone = server.text(memory)
    with ThreadPoolExecutor(count) as pool:
        answers = list(pool.map(one, range(count)))
    return {
        "requests": count,
        "refused": sum(text is None for text, _ in answers),
        "equal_to_alone": sum(text == alone for text, _ in answers),
        "slowest_seconds": round(max(seconds for _, seconds in answers), 3),
    }


def kill_owner(server: RayServer, memory: str, engines: int = 2) -> dict[str, Any]:
    """Write to a memory, kill its owner, and ask until it answers again; return after how long."""
    written = server.ask(f"/v1/memories/{memory}/write", {"text": FACT, "source": f"at {time.time()}"})
    before, killed = server.text(memory), server.owner(memory)
    os.kill(killed, signal.SIGKILL)
    begun, refused, after = time.perf_counter(), 0, None
    while after is None:
        try:
            after = server.text(memory)
        except (urllib.error.HTTPError, OSError):
            refused += 1
    seconds = time.perf_counter() - begun
    kept = server.ask(f"/v1/memories/{memory}/sources")["data"]
    server.wait_for(engines)
    return {
        "seconds_until_served": round(seconds, 3),
        "refused": refused,
        "same_answer": after == before,
        "last_write_there": kept[-1]["tokens"] == written["tokens"],
        "sources": len(kept),
        "seconds_until_replaced": round(time.perf_counter() - begun, 1),
    }


def hand_over(server: RayServer, memories: Sequence[str]) -> float:
    """Ask all memories once, some of which have another owner since an engine was replaced; return the longest."""
    longest = 0.0
    for memory in memories:
        begun = time.perf_counter()
        server.text(memory)
        longest = max(longest, time.perf_counter() - begun)
    return round(longest, 3)


def main() -> None:
    """Measure, and write the record."""
    with tempfile.TemporaryDirectory() as folder, serve(
        Path(folder) / "memories", "--engines", "2", "--waiting", "256"
    ) as server:  # fmt: skip
        server.wait_for(2)
        memories = [f"memory-{number}" for number in range(16)]
        for memory in memories:
            server.ask("/v1/memories", {"id": memory})
            server.ask(f"/v1/memories/{memory}/write", {"text": FACT, "source": "fact"})
        hot = ask_at_once(server, memories[0], HOT)
        kills = [kill_owner(server, memories[0]) for _ in range(KILLS)]
        longest = hand_over(server, memories)
    record = {
        **run_info(ray=version("ray"), model="recall-tiny", engines=2, load_average=load_average()),
        "hot": hot,
        "worst_seconds_until_served": max(kill["seconds_until_served"] for kill in kills),
        "refused_after_kills": sum(kill["refused"] for kill in kills),
        "longest_hand_over_seconds": longest,
        "kills": kills,
    }
    write(record_path("serving", "ray_owner"), record)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
