"""SIGKILL and SIGTERM in an import, a fork or an export: nothing half is there, and asking again succeeds.

    python -m benchmarks.serving.kill_copies --rounds 5     # writes records/kill-copies.json

In every round a request is sent, and at any moment of it all processes of the server are killed, or the engine's alone,
or the server is told to end. Afterwards the memory that was to be made or filled must be there wholly or not at all,
the same request must succeed, or say that it had succeeded, and every other memory must be as it was. At the end each
byte of all memories is checked, and every one is opened.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2
from attrs import define, field

from benchmarks.records import record_path, write
from benchmarks.serving.kill9 import NOTE
from benchmarks.serving.server import Client, Server, folder, stories
from mplus.environment import load_average, run_info
from mplus.memory.directory.offline import directory_faults

KINDS, WAYS = ("import", "fork", "export"), ("all", "engine", "terminated")
WHOLE = "whole"
"""The memory that copies are made of."""


@define(eq=False)
class Round:
    """One request that is cut off.

    Attributes:
        client: of the server.
        number: in the names of what is made.
        exported: the whole memory, as it is exported.
        sources: as they are listed of it.
    """

    client: Client
    number: int
    exported: bytes
    sources: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """The id of the memory that is made or filled."""
        return f"copy-{self.number}"

    async def ask(self, kind: str) -> tuple[int, bytes]:
        """Send the request; return status and body."""
        http = self.client.http
        if kind == "import":
            answer = await http.post(f"/v1/memories/{self.name}/import", content=self.exported)
        elif kind == "fork":
            answer = await http.post(f"/v1/memories/{WHOLE}/fork", json={"id": self.name})
        else:
            answer = await http.get(f"/v1/memories/{WHOLE}/export")
        return answer.status_code, answer.content

    async def state(self) -> str:
        """Return what is there under the name: "nothing", "empty", "whole" or "half"."""
        found = await self.client.http.get(f"/v1/memories/{self.name}/sources")
        if found.status_code == 404:
            return "nothing"
        data = found.json()["data"]
        return "empty" if not data else WHOLE if data == self.sources else "half"

    async def faults(self, kind: str) -> list[str]:
        """Return what is wrong after the request was cut off; then send it again, and return what is wrong then."""
        wanted = {"import": {"empty", WHOLE}, "fork": {"nothing", WHOLE}, "export": {"nothing"}}[kind]
        found = [f"{kind}: {state}"] if (state := await self.state()) not in wanted else []
        status, content = await self.ask(kind)
        if status != 200 and not (state == WHOLE and status == 409):
            found.append(f"{kind}: {status} when asked again where it was {state}")
        if kind == "export" and content != self.exported:
            found.append("export: another content")
        if kind != "export" and await self.state() != WHOLE:
            found.append(f"{kind}: not whole when asked again")
        return found


@define(eq=False)
class Counts:
    """What was counted: rounds, those whose request was cut off, and what was wrong."""

    rounds: Counter[str] = field(factory=Counter)
    cut_off: Counter[str] = field(factory=Counter)
    faults: list[str] = field(factory=list)


async def cut_off(server: Server, one: Round, kind: str, way: str, seconds: float) -> bool:
    """Send a request and kill what answers it meanwhile; return whether it had no answer, and serve again."""
    asked = asyncio.ensure_future(one.ask(kind))
    await asyncio.sleep(random.uniform(0, seconds))  # noqa: S311 - any moment will do
    if way == "engine":
        os.kill(server.pids[-1], signal.SIGKILL)
    else:
        await asyncio.to_thread(server.stop, signal.SIGKILL if way == "all" else signal.SIGTERM)
    try:
        status = (await asked)[0]
    except httpx2.TransportError:
        status = 0
    if way == "engine":
        while not (await one.client.http.get("/ready")).is_success:
            await asyncio.sleep(0.05)
    else:
        await server.start()
    return status not in (200, 409)


async def run(rounds: int, kinds: tuple[str, ...] = KINDS, ways: tuple[str, ...] = WAYS) -> dict[str, Any]:
    """Cut off every kind of request in every way so many times, and return the record."""
    counts = Counts()
    with folder() as where:
        server = Server(stories(where), where / "memories")
        await server.start()
        try:
            async with server.client() as client:
                await client.make(WHOLE)
                for number in range(8):
                    await client.write(WHOLE, NOTE * 24, f"note {number}")
                exported = (await client.http.get(f"/v1/memories/{WHOLE}/export")).content
                sources = await client.sources(WHOLE)
            for number, (_, kind, way) in enumerate(itertools.product(range(rounds), kinds, ways)):
                async with server.client() as client:
                    one = Round(client, number, exported, sources)
                    if kind == "import":
                        await client.make(one.name)
                    begun = time.perf_counter()
                    await client.http.get(f"/v1/memories/{WHOLE}/export")
                    seconds = 2 * (time.perf_counter() - begun)
                    counts.cut_off[f"{kind}, {way}"] += await cut_off(server, one, kind, way, seconds)
                async with server.client() as client:
                    counts.rounds[f"{kind}, {way}"] += 1
                    counts.faults += await Round(client, number, exported, sources).faults(kind)
            async with server.client() as client:
                for made in (await client.http.get("/v1/memories")).json()["data"]:
                    if await client.sources(made["id"]) != sources:
                        counts.faults.append(f"{made['id']}: not as it was")
        finally:
            server.stop()
        counts.faults += left_behind(server.memories)
        drafts = len(list((server.memories / ".drafts").glob("*")))
    return {
        **run_info(),
        "load_average": load_average(),
        "settings": {"rounds": rounds},
        "exported_bytes": len(exported),
        "rounds": dict(counts.rounds),
        "without_answer": dict(counts.cut_off),
        "faults": counts.faults,
        "drafts_left_for_an_hour": drafts,
    }


def left_behind(memories: Path) -> list[str]:
    """Return what is wrong with the files of a server that has ended."""
    found = []
    for tenant in (path for path in memories.iterdir() if len(path.name) == 64):
        for path in tenant.iterdir():
            if path.is_dir() and not path.with_suffix(".json").exists():
                found.append(f"{path.name}: a directory without a name")
            elif path.is_dir():
                found += directory_faults(path)
    return found


def main() -> int:
    """Measure, write the record, and return 1 where anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    record = asyncio.run(run(options.rounds))
    write(options.out or record_path("serving", "kill-copies"), record)
    return 1 if record["faults"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
