"""Memories that are open: their versions over restarts, what they count for, and those that have failed."""

from __future__ import annotations

import asyncio
import fcntl
import os
import time
from typing import Any

import pytest

from mplus.serving.engine.decoder import ServedDecoder
from mplus.serving.messages import (
    DeleteMemory,
    DescribeMemory,
    FlushMemory,
    ForgetSource,
    ForkMemory,
    ListSources,
    MakeMemory,
    MemoryName,
    ReleaseMemory,
    WriteMemory,
)
from tests.serving.engine.conftest import ADA, STORY, Serve, ask, run, tell, tokens_of
from tests.serving.engine.test_memories import refused, version_of


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


@pytest.mark.parametrize("name", [ADA, MemoryName("tests", "default")], ids=lambda name: name.id)
@pytest.mark.parametrize("how", ["at once", "restarted", "as a fork"])
def test_no_version_is_told_again_where_a_memory_was_deleted(
    serve: Serve, decoder: ServedDecoder, name: MemoryName, how: str
) -> None:
    async def told() -> list[int]:
        found: list[int] = []
        client = serve()
        other = MemoryName("tests", "other")
        await client.call(MakeMemory(other))
        await tell(client, other, STORY)
        for _ in range(3):
            if how == "as a fork":
                made: Any = await client.call(ForkMemory(other, name.id))
            else:
                made = await client.call(MakeMemory(name))
            found.append(made["version"])
            wrote = await tell(client, name, STORY * 2)
            version = (await client.call(DescribeMemory(name)))["version"]
            assert version == wrote["memory_version"] > found[-1]
            found.append(wrote["memory_version"])
            await client.call(DeleteMemory(name))
            if how == "restarted":
                await client.close()
                client = serve()
            if name.id == "default":  # reads as empty, which is another content than before
                found.append(await version_of(client, ask(decoder, name, "Lily", 1)) - 1)
        return found

    found = run(told())
    assert found == sorted(found)
    assert len(set(found)) == len(found)
    assert found[-1] < 2**53


def test_a_damaged_memory_that_was_deleted_lets_no_version_be_told_again(serve: Serve) -> None:
    async def told() -> list[int]:
        client = serve(open_memories=1)
        await client.call(MakeMemory(ADA))
        first = (await tell(client, ADA, STORY * 3))["memory_version"]
        await client.call(MakeMemory(MemoryName("tests", "other")))
        await client.call(ListSources(MemoryName("tests", "other")))
        for file in client.engine._tenants.path(ADA).glob("manifest*"):
            file.write_bytes(b"garbage")
        await client.call(DeleteMemory(ADA))
        made: Any = await client.call(MakeMemory(ADA))
        return [first, made["version"]]

    first, second = run(told())
    assert second > first


def test_memories_that_others_have_locked_keep_nobody_else_waiting(serve: Serve) -> None:
    """However many there are, and however many ask for one of them."""
    names = [MemoryName("tests", f"m{n}") for n in range(12)]

    async def asked() -> tuple[float, float]:
        client = serve(lock_seconds=1.0)
        for name in (*names, ADA):
            await client.call(MakeMemory(name))
        await client.close()
        client = serve(lock_seconds=1.0)
        held = []
        for name in names:
            folder = client.engine._tenants.path(name)
            folder.mkdir(exist_ok=True)
            (folder / "lock").touch()
            handle = os.open(folder / "lock", os.O_RDWR)
            fcntl.flock(handle, fcntl.LOCK_EX)
            held.append(handle)
        begun = time.perf_counter()
        busy = [asyncio.ensure_future(refused(client.call(ListSources(name)))) for name in names for _ in range(3)]
        await asyncio.sleep(0.1)
        await client.call(ListSources(ADA))
        other = time.perf_counter() - begun
        assert set(await asyncio.gather(*busy)) == {(503, "memory_busy")}
        all_told = time.perf_counter() - begun
        for handle in held:
            os.close(handle)
        await asyncio.gather(*(client.call(ListSources(name)) for name in names))
        return other, all_told

    other, all_told = run(asked())
    assert other < 0.9
    assert all_told < 2.5


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
