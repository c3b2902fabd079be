"""Clients that leave: how long their rows stay, of streamed, unstreamed and queued requests.

    python -m benchmarks.serving.cancel      # writes records/cancel.json

One client asks for a long answer and closes its connection: in the middle of a stream, of an answer that is not
streamed, and while it waits behind others. Measured is the time until the server's own metrics show its row, or its
place in the queue, to be free, looked at every few ms; a look takes some of that time.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path
from typing import Any

from benchmarks.records import record_path, write
from benchmarks.serving.server import Client, Server, folder, quantiles, stories
from mplus.environment import load_average, run_info

LOOK = 0.003
PROMPT, LONG = "In the garden there was", 200
"""A decode step takes some ms, so that an answer of so many tokens is far from its end when its client leaves."""


async def until(client: Client, running: int, waiting: int) -> float:
    """Return the seconds until so many requests run and wait."""
    begun = time.perf_counter()
    while True:
        now = await client.metrics()
        if (now["mplus_batch_rows"], now["mplus_rows_waiting"]) == (running, waiting):
            return time.perf_counter() - begun
        if time.perf_counter() - begun > 30:
            raise RuntimeError(f"after 30 s {now['mplus_batch_rows']} rows are there")
        await asyncio.sleep(LOOK)


async def left(client: Client, watch: Client, *, stream: bool, running: int = 0, waiting: int = 0) -> float:
    """Let a client ask and leave; return the seconds until all is as before."""
    asked = asyncio.ensure_future(
        client.http.post("/v1/completions", json=client.body(None, PROMPT, LONG, stream=stream))
    )
    queued = running > 0
    await until(watch, running if queued else 1, waiting + 1 if queued else 0)
    asked.cancel()
    return await until(watch, running, waiting)


async def run(times: int) -> dict[str, Any]:
    """Let clients leave so many times in each way, and return the record."""
    with folder() as where:
        server = Server(stories(where), where / "memories", ["--max-batch", "1"])
        await server.start()
        try:
            async with server.client() as client, server.client("watch") as watch:
                look = []
                for _ in range(20):
                    begun = time.perf_counter()
                    await watch.metrics()
                    look.append(time.perf_counter() - begun)
                found: dict[str, Any] = {"look": quantiles(look)}
                found["streamed"] = quantiles([await left(client, watch, stream=True) for _ in range(times)])
                found["unstreamed"] = quantiles([await left(client, watch, stream=False) for _ in range(times)])
                found["queued"] = quantiles([await queued(client, watch) for _ in range(times)])
        finally:
            server.stop()
    return {**run_info(), "load_average": load_average(), "times": times, "seconds_until_free": found}


async def queued(client: Client, watch: Client) -> float:
    """Let a client leave the queue behind another one; return the seconds until its place is free."""
    first = asyncio.ensure_future(
        client.http.post("/v1/completions", json=client.body(None, PROMPT, LONG, stream=True))
    )
    await until(watch, 1, 0)
    seconds = await left(client, watch, stream=False, running=1)
    first.cancel()
    await until(watch, 0, 0)
    return seconds


def main() -> None:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    write(options.out or record_path("serving", "cancel"), asyncio.run(run(options.times)))


if __name__ == "__main__":
    main()
