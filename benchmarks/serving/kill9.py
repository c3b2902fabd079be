"""SIGKILL in the middle of writes: what was acknowledged is there, and what is tried again is there once.

    python -m benchmarks.serving.kill9 --rounds 50     # writes records/kill9.json

Users write notes without a pause, each under an id of its own, and try one that failed again under the same id, as
OpenAI's clients do. After some seconds all processes of the server are killed at once and it is started on the same
folder. At the end every note that was acknowledged must be there with exactly the tokens that its write reported:
``lost`` are those that are not there, ``doubled`` those with more.

``--engine`` kills the engine's process alone, which the server starts again by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import httpx2

from benchmarks.records import record_path, write
from benchmarks.serving.server import Client, Server, folder, quantiles, stories
from mplus.environment import load_average, run_info

NOTE = "Tom found a little box under the big tree. He took it home and showed it to his mom and dad. "


async def note(client: Client, user: int, number: int) -> int:
    """Write a note until it is acknowledged; return its tokens."""
    text = NOTE * (2 + (user + number) % 12) + f"It was number {number}."
    while True:
        try:
            report = await client.write(f"user{user}", text, f"note {number}", f"{user}-{number}")
            return int(report["tokens"])
        except httpx2.HTTPStatusError as error:
            if error.response.status_code not in (500, 502, 503, 429):
                raise
        except httpx2.TransportError:
            pass
        await asyncio.sleep(0.02)


async def write_on(client: Client, user: int, done: dict[tuple[int, int], int], stop: asyncio.Event) -> None:
    """Write one note after another, until told to stop."""
    number = sum(1 for own, _ in done if own == user)
    while not stop.is_set():
        done[user, number] = await note(client, user, number)
        number += 1


async def run(options: argparse.Namespace) -> dict[str, Any]:
    """Kill the server in every round, and return the record."""
    done: dict[tuple[int, int], int] = {}
    again: list[float] = []
    with folder() as where:
        server = Server(stories(where), where / "memories")
        await server.start()
        try:
            async with server.client() as client:
                for user in range(options.users):
                    await client.make(f"user{user}")
            for _ in range(options.rounds):
                stop = asyncio.Event()
                async with server.client() as client:
                    users = [asyncio.ensure_future(write_on(client, user, done, stop)) for user in range(options.users)]
                    await asyncio.sleep(random.uniform(0.5, options.seconds))  # noqa: S311 - any moment will do
                    begun = time.perf_counter()
                    if options.engine:
                        os.kill(server.pids[-1], signal.SIGKILL)
                    else:
                        server.stop(signal.SIGKILL)
                        for one in users:
                            one.cancel()
                        await server.start()
                    stop.set()
                    await asyncio.gather(*users, return_exceptions=True)
                    again.append(time.perf_counter() - begun)
                async with server.client() as client:  # tried again after the start, as a client would
                    for user in range(options.users):
                        number = sum(1 for own, _ in done if own == user)
                        done[user, number] = await note(client, user, number)
            lost, doubled = await compared(server, options.users, done)
        finally:
            server.stop()
    return {
        **run_info(),
        "load_average": load_average(),
        "settings": {"rounds": options.rounds, "users": options.users, "killed": "engine" if options.engine else "all"},
        "acknowledged": len(done),
        "lost": lost,
        "doubled": doubled,
        "until_served_again": quantiles(again),
    }


async def compared(server: Server, users: int, done: dict[tuple[int, int], int]) -> tuple[list[str], list[str]]:
    """Return the notes that are not there, or not whole, and those with too much."""
    lost: list[str] = []
    doubled: list[str] = []
    async with server.client() as client:
        for user in range(users):
            held = {one["name"]: one["tokens"] for one in await client.sources(f"user{user}")}
            for (own, number), tokens in done.items():
                if own == user and held.get(f"note {number}", 0) != tokens:
                    (lost if held.get(f"note {number}", 0) < tokens else doubled).append(f"{user}: note {number}")
    return lost, doubled


def main() -> int:
    """Measure, write the record, and return 1 where anything was lost or doubled."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--users", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--engine", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    record = asyncio.run(run(options))
    write(options.out or record_path("serving", "kill9-engine" if options.engine else "kill9"), record)
    return 1 if record["lost"] or record["doubled"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
