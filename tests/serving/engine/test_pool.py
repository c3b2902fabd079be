"""Memories that are open: their versions over restarts, what they count for, and those that have failed."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from mplus.serving.engine.decoder import ServedDecoder
from mplus.serving.messages import (
    DescribeMemory,
    FlushMemory,
    ForgetSource,
    ListSources,
    MakeMemory,
    MemoryName,
    ReleaseMemory,
    WriteMemory,
)
from tests.serving.engine.conftest import ADA, STORY, Serve, ask, run, tell, tokens_of


@pytest.mark.parametrize("how", ["restarted", "evicted", "released"])
def test_no_version_is_told_of_two_contents(serve: Serve, how: str) -> None:
    """Also where text only waits, and wherever the memory is closed and opened in between."""
    commands = [
        WriteMemory(ADA, "Hi.", "note"), WriteMemory(ADA, "Ho.", "note"), WriteMemory(ADA, STORY * 3, "story"),
        ForgetSource(ADA, "story"), WriteMemory(ADA, "He.", "note"), FlushMemory(ADA), WriteMemory(ADA, "Oh.", "b"),
    ]  # fmt: skip

    async def told() -> list[int]:
        found: list[int] = []
        client = serve(open_memories=1)
        await client.call(MakeMemory(ADA))
        await client.call(MakeMemory(MemoryName("tests", "other")))
        for command in commands:
            await client.call(command)
            version = (await client.call(DescribeMemory(ADA)))["version"]
            if how == "restarted":
                await client.close()
                client = serve(open_memories=1)
            elif how == "evicted":
                await client.call(ListSources(MemoryName("tests", "other")))
            else:
                await client.call(ReleaseMemory(ADA))
            again = (await client.call(DescribeMemory(ADA)))["version"]
            assert isinstance(version, int)
            assert isinstance(again, int)
            assert again >= version > (found[-1] if found else 0)
            found.append(again)
        return found

    found = run(told())
    assert sorted(set(found)) == found
    assert found[-1] < 2**53  # JSON's numbers


def test_the_limit_of_ram_counts_what_is_not_in_files(serve: Serve, decoder: ServedDecoder) -> None:
    """Long-term rows are in mapped files once there is a checkpoint; and one memory is always served."""
    names = [MemoryName("tests", f"m{n}") for n in range(3)]

    async def written() -> list[Any]:
        client = serve()
        for name in names:
            await client.call(MakeMemory(name))
            await tell(client, name, STORY * 8)
            await client.call(ForgetSource(name, (await _note(client, name))))
        numbers = dict(await client.metrics())
        sizes = [place.memory.ram_bytes for place in client.engine._pool._places.values() if place.memory is not None]
        rows = [place.memory.nbytes for place in client.engine._pool._places.values() if place.memory is not None]
        assert numbers["open_memories"] == 3
        assert numbers["memory_bytes"] == sum(sizes) < sum(rows)
        answers = [await tokens_of(client, ask(decoder, name, "Lily")) for name in names]
        await client.close()
        return answers

    answers = run(written())

    async def again(limit: int | None) -> tuple[list[Any], dict[str, float]]:
        client = serve(ram_bytes=limit)
        found = [await tokens_of(client, ask(decoder, name, "Lily")) for name in names]
        while any(place.closing for place in client.engine._pool._places.values()):
            await asyncio.sleep(0.01)
        numbers = dict(await client.metrics())
        await client.close()
        return found, numbers

    found, numbers = run(again(None))
    assert found == answers
    whole = int(numbers["memory_bytes"])
    for limit, most in ((whole - 1, 2), (1, 1)):
        found, numbers = run(again(limit))
        assert found == answers
        assert numbers["open_memories"] <= most
        assert numbers["memory_bytes"] <= limit or most == 1
        assert numbers["evictions"] >= 3 - most


async def _note(client: Any, name: MemoryName) -> str:
    await tell(client, name, STORY, "note")
    return "note"
