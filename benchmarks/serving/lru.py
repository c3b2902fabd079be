"""More users than memories that may be open: bytes, descriptors and what coming back costs.

    python -m benchmarks.serving.lru      # writes records/lru.json

2,000 users write a note each, with 64 memories open at once; then some of them, drawn at random, are asked. The first
token of an answer from a memory that has to be opened again is compared with one from a memory that is open.
"""

from __future__ import annotations

import argparse
import asyncio
import random
from pathlib import Path
from typing import Any

from benchmarks.records import record_path, write
from benchmarks.serving.load import prompt, story
from benchmarks.serving.server import Server, descriptors, folder, quantiles, resident_bytes, stories
from mplus.environment import load_average, run_info


async def run(options: argparse.Namespace) -> dict[str, Any]:
    """Write, ask, and return the record."""
    errors = 0
    with folder() as where:
        server = Server(stories(where), where / "memories", ["--open", str(options.open)])
        await server.start()
        try:
            async with server.client() as client:
                sizes = [
                    {"users": 0, "rss_mib": resident_bytes(server.pids) >> 20, "descriptors": descriptors(server.pids)}
                ]
                for first in range(0, options.users, 32):
                    some = range(first, min(first + 32, options.users))
                    await asyncio.gather(*(client.make(f"user{user}") for user in some))
                    written = await asyncio.gather(
                        *(client.write(f"user{user}", story(user), "story") for user in some), return_exceptions=True
                    )
                    errors += sum(isinstance(one, Exception) for one in written)
                    if first // 32 % 8 == 7 or some[-1] == options.users - 1:
                        rss = resident_bytes(server.pids) >> 20
                        sizes.append({"users": some[-1] + 1, "rss_mib": rss, "descriptors": descriptors(server.pids)})
                draws = random.Random(0)  # noqa: S311 - any users will do
                closed, opened = [], []
                for _ in range(options.asked):
                    user = draws.randrange(options.users - options.open)  # the others may be open
                    closed.append((await client.answer(f"user{user}", prompt(user), 2)).first)
                    opened.append((await client.answer(f"user{user}", prompt(user), 2)).first)
                numbers = await client.metrics()
                used = await client.http.get("/v1/memories", params={"limit": 1})
                used.raise_for_status()
        finally:
            server.stop()
    reopening = [cold - warm for cold, warm in zip(closed, opened, strict=True)]
    return {
        **run_info(),
        "load_average": load_average(),
        "settings": {"users": options.users, "open": options.open, "asked": options.asked},
        "errors": errors,
        "sizes": sizes,
        "first_token_of_a_closed_memory": quantiles(closed),
        "first_token_of_an_open_memory": quantiles(opened),
        "opening_again": quantiles(reopening),
        "open_memories": numbers.get("mplus_open_memories"),
        "evictions": numbers.get("mplus_evictions"),
    }


def main() -> None:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--users", type=int, default=2000)
    parser.add_argument("--open", type=int, default=64)
    parser.add_argument("--asked", type=int, default=100)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    write(options.out or record_path("serving", "lru"), asyncio.run(run(options)))


if __name__ == "__main__":
    main()
