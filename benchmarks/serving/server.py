"""A server in a process of its own, clients of it, and what the system says of its processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2
from attrs import define, field

from benchmarks.records import ROOT

ADMIN_KEY = "a key of benchmarks"
STORIES = "stories260K"
SIZES: dict[str, Any] = {
    "chunk_tokens": 128,
    "memory_tokens_per_chunk": 32,
    "short_term_tokens": 144,
    "retrieved_tokens": 96,
    "long_term_tokens": 20000,
    "retriever": {"name": "linear", "width": 32},
}
"""Of the memory of stories260K: a read takes 241 of its 512 positions."""
PATIENCE = 300.0
"""Seconds that a server has to start, on a machine that does other things."""


@define(eq=False)
class Server:
    """``mplus serve`` on a free port of this machine.

    Attributes:
        model: name or folder.
        memories: the folder of all memories.
        options: further ones of the command.
        key: of a tenant.
    """

    model: str
    memories: Path
    options: Sequence[str] = ()
    key: str = ""
    url: str = ""
    started_seconds: float = 0.0
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    async def start(self) -> None:
        """Start it, and wait until it answers."""
        port, begun = free_port(), time.perf_counter()
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "mplus", "serve", self.model, "--memories", str(self.memories)]
        log = (self.memories.parent / "serve.log").open("ab")
        self.process = subprocess.Popen(
            [*command, "--port", str(port), "--threads", "1", *self.options],
            cwd=ROOT, stdout=log, stderr=log, env={**os.environ, "MPLUS_ADMIN_KEY": ADMIN_KEY},
        )  # fmt: skip
        log.close()
        while not await self._answers():
            if self.process.poll() is not None or time.perf_counter() - begun > PATIENCE:
                raise RuntimeError(f"the server did not start: see {self.memories.parent / 'serve.log'}")
            await asyncio.sleep(0.05)
        self.started_seconds = time.perf_counter() - begun

    async def _answers(self) -> bool:
        try:
            async with httpx2.AsyncClient(base_url=self.url) as client:
                return bool((await client.get("/ready")).is_success)
        except httpx2.TransportError:
            return False

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End it, and with SIGKILL all of its processes at once."""
        if self.process is not None:
            for pid in self.pids if how is signal.SIGKILL else [self.process.pid]:
                os.kill(pid, how)
            self.process.wait(120)
            self.process = None

    @property
    def pids(self) -> list[int]:
        """The processes of the server: the front, the engine and helpers."""
        return [] if self.process is None else tree(self.process.pid)

    @asynccontextmanager
    async def client(self, tenant: str = "bench") -> AsyncIterator[Client]:
        """Yield a client with a key of a tenant."""
        async with httpx2.AsyncClient(
            base_url=self.url, timeout=None, limits=httpx2.Limits(max_connections=None)
        ) as http:
            made = await http.post("/v1/admin/keys", json={"tenant": tenant}, headers=_bearer(ADMIN_KEY))
            made.raise_for_status()
            http.headers.update(_bearer(made.json()["key"]))
            yield Client(http, self.model)


@define(frozen=True)
class Answer:
    """An answer that was streamed.

    Attributes:
        text: all of it.
        tokens: as the server counts them.
        first: seconds to the first frame with text.
        gaps: seconds between the frames behind it.
    """

    text: str
    tokens: int
    first: float
    gaps: list[float]


@define(eq=False)
class Client:
    """A client of a server, with one key."""

    http: httpx2.AsyncClient
    model: str

    async def make(self, memory: str) -> None:
        """Make a memory, if it is not there."""
        made = await self.http.post("/v1/memories", json={"id": memory})
        if made.status_code != 409:
            made.raise_for_status()

    async def write(self, memory: str, text: str, source: str, key: str | None = None) -> dict[str, Any]:
        """Write a text. Raises HTTPStatusError."""
        headers = {} if key is None else {"Idempotency-Key": key}
        body = {"text": text, "source": source}
        done = await self.http.post(f"/v1/memories/{memory}/write", json=body, headers=headers)
        done.raise_for_status()
        report: dict[str, Any] = done.json()
        return report

    async def sources(self, memory: str) -> list[dict[str, Any]]:
        """Return the sources of a memory."""
        found = await self.http.get(f"/v1/memories/{memory}/sources")
        found.raise_for_status()
        return list(found.json()["data"])

    def body(self, memory: str | None, prompt: str, tokens: int, **more: Any) -> dict[str, Any]:
        """Return a greedy request for so many tokens."""
        return {
            "model": self._name,
            "prompt": prompt,
            "memory": memory,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            **more,
        }

    @property
    def _name(self) -> str:
        return Path(self.model).name if Path(self.model).exists() else self.model

    async def answer(self, memory: str | None, prompt: str, tokens: int) -> Answer:
        """Stream an answer, and time its frames."""
        body = self.body(memory, prompt, tokens, stream=True, stream_options={"include_usage": True})
        begun, times, frames = time.perf_counter(), [], []
        async with self.http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                raise RuntimeError(f"{response.status_code}: {(await response.aread()).decode()}")
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    times.append(time.perf_counter())
                    frames.append(line)
        texts, count, at = [], 0, []
        for moment, line in zip(times, frames, strict=True):
            frame = json.loads(line[6:])
            if frame.get("usage"):
                count = frame["usage"]["completion_tokens"]
            text = "".join(choice["text"] for choice in frame["choices"])
            if text:
                texts.append(text)
                at.append(moment)
        gaps = [later - earlier for earlier, later in pairwise(at)]
        return Answer("".join(texts), count, (at[0] if at else times[-1]) - begun, gaps)

    async def metrics(self) -> dict[str, float]:
        """Return the metrics of the server, by name."""
        found = await self.http.get("/metrics", headers=_bearer(ADMIN_KEY))
        lines = [line.rpartition(" ") for line in found.text.splitlines() if line and line[0] != "#"]
        return {name: float(value) for name, _, value in lines}


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@contextmanager
def folder() -> Iterator[Path]:
    """Yield a folder for memories and a log, removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="mplus-serving-", ignore_cleanup_errors=True) as made:
        yield Path(made)


def stories(where: Path) -> str:
    """Save stories260K with a memory of ``SIZES``, whose additions are drawn, and return the folder."""
    import torch

    import mplus
    from mplus.hf.pretrained.shipped import load_decoder, load_tokenizer

    path = where / STORIES
    if not path.exists():
        torch.manual_seed(0)
        mplus.wrap(load_decoder(), mplus.MPlusConfig(**SIZES)).save_pretrained(path, save_base=True)
        load_tokenizer().save_pretrained(path)
    return str(path)


def free_port() -> int:
    """Return a port that nothing listens at now."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tree(pid: int) -> list[int]:
    """Return a process and its children, as Linux tells."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    except OSError:
        return []
    return [pid, *(one for child in children for one in tree(int(child)))]


def resident_bytes(pids: Sequence[int]) -> int:
    """Return the resident bytes of processes together, as Linux tells; shared pages count in each."""
    page = os.sysconf("SC_PAGE_SIZE")
    return sum(page * int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) for pid in pids)


def descriptors(pids: Sequence[int]) -> int:
    """Return the open file descriptors of processes together."""
    return sum(sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()) for pid in pids)


def quantiles(seconds: Sequence[float]) -> Mapping[str, float | int]:
    """Return median, high quantiles and number of some durations, in ms."""
    ordered = sorted(seconds)

    def at(share: float) -> float:
        return round(1e3 * ordered[min(int(share * len(ordered)), len(ordered) - 1)], 2) if ordered else 0.0

    return {"p50_ms": at(0.5), "p95_ms": at(0.95), "p99_ms": at(0.99), "max_ms": at(1.0), "count": len(ordered)}
