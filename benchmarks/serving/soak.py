"""A server under load for a long time: its bytes and descriptors stay what they are.

    python -m benchmarks.serving.soak --minutes 20     # writes records/soak.json

16 users ask, write notes, forget old ones, leave in the middle of answers and come back, with fewer memories open than
there are users. After a quarter of the time, in which caches fill, resident bytes and descriptors are noted every ten
seconds; the record says how far they were from their median.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.records import record_path, write
from benchmarks.serving.load import prompt, story
from benchmarks.serving.server import Client, Server, descriptors, folder, resident_bytes, stories
from mplus.environment import load_average, run_info

NOTES = 6
"""Notes that a user keeps."""


async def live(client: Client, user: int, until: float, done: Counter[str]) -> None:
    """Do what a user does, until the time is over."""
    draws, number, name = random.Random(user), 0, f"user{user}"  # noqa: S311 - any order will do
    await client.make(name)
    while time.perf_counter() < until:
        what = draws.random()
        if what < 0.3:
            await client.write(name, story(user), f"note {number}", f"{user}-{number}")
            if number >= NOTES:
                gone = await client.http.delete(f"/v1/memories/{name}/sources/note%20{number - NOTES}")
                gone.raise_for_status()
            number += 1
            done["written"] += 1
        elif what < 0.4:
            leaving = asyncio.ensure_future(client.answer(name, prompt(user), 200))
            await asyncio.sleep(draws.random() / 2)
            leaving.cancel()
            done["left"] += 1
        else:
            await client.answer(name, prompt(user), 32)
            done["answered"] += 1


async def run(options: argparse.Namespace) -> dict[str, Any]:
    """Let users live for so many minutes, and return the record."""
    done: Counter[str] = Counter()
    points: list[dict[str, float]] = []
    with folder() as where:
        server = Server(stories(where), where / "memories", ["--open", str(options.open)])
        await server.start()
        begun = time.perf_counter()
        end = begun + 60 * options.minutes
        try:
            async with server.client() as client:
                users = [asyncio.ensure_future(live(client, user, end, done)) for user in range(options.users)]
                while not all(one.done() for one in users):
                    await asyncio.sleep(10)
                    rss, files = resident_bytes(server.pids) >> 20, descriptors(server.pids)
                    points.append({"s": round(time.perf_counter() - begun), "rss_mib": rss, "descriptors": files})
                for one in users:
                    one.result()
        finally:
            server.stop()
    kept = [point for point in points if point["s"] > 15 * options.minutes]
    middle = median(point["rss_mib"] for point in kept)
    return {
        **run_info(),
        "load_average": load_average(),
        "settings": {"minutes": options.minutes, "users": options.users, "open": options.open},
        "done": dict(done),
        "rss_mib_median": middle,
        "rss_farthest_from_median": round(max(abs(point["rss_mib"] / middle - 1) for point in kept), 4),
        "descriptors": [min(point["descriptors"] for point in kept), max(point["descriptors"] for point in kept)],
        "points": points,
    }


def main() -> None:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--open", type=int, default=8)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    write(options.out or record_path("serving", "soak"), asyncio.run(run(options)))


if __name__ == "__main__":
    main()
