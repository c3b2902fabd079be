"""Disks that are full, locks of others, clocks that go back, changes of what is read: each is told with an error of its
own, nothing is half done, everyone else is served, and afterwards all goes on in the same engine."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mplus
from mplus.hf.pretrained.shipped import load_decoder
from mplus.memory import transaction
from mplus.memory.directory import open as opening
from mplus.serving.engine.decoder import ServedDecoder
from mplus.serving.engine.memories import tenants
from mplus.serving.messages import (
    Command,
    DeleteMemory,
    DescribeMemory,
    Ended,
    ExportMemory,
    FlushMemory,
    ForgetSource,
    ForkMemory,
    ImportMemory,
    ListMemories,
    ListSources,
    MakeMemory,
    MemoryName,
)
from tests.memory.disks.disks import Watched
from tests.serving.engine.conftest import ADA, SIZES, STORY, Serve, ask, run, tell, tokens_of
from tests.serving.engine.test_memories import refused

BOB = MemoryName("others", "bob")


class Disk(Watched):
    """Fails with an error of the system, from the moment one is set."""

    code = 0

    def before(self, call: int, what: str) -> None:
        writes = {"create", "write"} if self.code == errno.ENOSPC else {what}
        if self.code and what in writes:
            raise OSError(self.code, os.strerror(self.code))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    found = Disk()
    monkeypatch.setattr(opening, "FileSystem", lambda: found)
    monkeypatch.setattr(tenants, "FileSystem", lambda: found)
    return found


FULL, FAILED = (507, "insufficient_storage"), (507, "disk_failed")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO], ids=errno.errorcode.get)
def test_a_disk_that_cannot_be_written_refuses_writes_and_nothing_else(
    serve: Serve, decoder: ServedDecoder, disk: Disk, number: int, tmp_path: Path
) -> None:
    changes: list[Command] = [
        ForgetSource(ADA, "told"), FlushMemory(ADA), MakeMemory(MemoryName("tests", "new")), ForkMemory(ADA, "copy"),
        DeleteMemory(ADA),
    ]  # fmt: skip

    told = (FULL, FAILED) if number == errno.EIO else (FULL,)

    async def life() -> None:
        client = serve()
        await client.call(MakeMemory(ADA))
        await tell(client, ADA, STORY * 3)
        await tell(client, ADA, "Hi.", "waits")
        before = (await client.call(ListSources(ADA)))["data"]
        answer = await tokens_of(client, ask(decoder, ADA, "Lily"))
        disk.code = number
        for _ in range(2):
            assert await refused(tell(client, ADA, STORY * 3, "more")) in told
            assert await refused(tell(client, MemoryName("tests", "default"), STORY)) in told
            for change in changes:
                assert await refused(client.call(change)) in told, change
            assert (await client.call(ListSources(ADA)))["data"] == before
            assert await tokens_of(client, ask(decoder, ADA, "Lily")) == answer
        disk.code = 0
        assert (await client.call(ListSources(ADA)))["data"] == before
        assert await tokens_of(client, ask(decoder, ADA, "Lily")) == answer
        await tell(client, ADA, STORY * 3, "more")
        assert [one["name"] for one in (await client.call(ListSources(ADA)))["data"]] == ["told", "waits", "more"]
        assert [one["id"] for one in (await client.call(ListMemories("tests")))["data"]] in (
            ["ada"],
            ["ada", "default"],
        )
        await client.call(ForkMemory(ADA, "copy"))
        await client.call(DeleteMemory(ADA))

    run(life())


def test_a_memory_that_another_process_has_is_busy_and_then_served(
    serve: Serve, decoder: ServedDecoder, tmp_path: Path
) -> None:
    async def life() -> None:
        client = serve(lock_seconds=0.05)
        for name in (ADA, BOB):
            await client.call(MakeMemory(name))
            await tell(client, name, STORY * 3)
        answer = await tokens_of(client, ask(decoder, ADA, "Lily"))
        await client.close()
        client = serve(lock_seconds=0.05)
        lock = client.engine._tenants.path(ADA) / "lock"
        holds = (
            "import fcntl, sys; f = open(sys.argv[1], 'r+'); fcntl.flock(f, fcntl.LOCK_EX); print(); sys.stdin.read()"
        )
        with subprocess.Popen(
            [sys.executable, "-c", holds, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as other:
            assert other.stdout is not None
            other.stdout.readline()
            for work in (
                tokens_of(client, ask(decoder, ADA, "Lily")), tell(client, ADA, STORY), client.call(DeleteMemory(ADA)),
                client.call(ExportMemory(ADA, str(tmp_path / "out"))), client.call(ListSources(ADA)),
            ):  # fmt: skip
                assert await refused(work) == (503, "memory_busy")
            assert len(await tokens_of(client, ask(decoder, BOB, "Lily", 3))) == 3
            other.communicate()
        assert await tokens_of(client, ask(decoder, ADA, "Lily")) == answer

    run(life())


@pytest.mark.parametrize("other", ["mechanism", "sizes", "model"])
def test_a_memory_of_another_decoder_is_a_conflict(
    serve: Serve, decoder: ServedDecoder, tmp_path: Path, other: str
) -> None:
    """Where it lies in the folder, and where it is to be taken in."""
    torch.manual_seed(0)
    base = load_decoder()
    if other == "model":
        with torch.no_grad():
            base.model.layers[1].self_attn.k_proj.weight.mul_(1.5)
    sizes = {"mechanism": "kv"} if other == "mechanism" else {**SIZES, "memory_tokens_per_chunk": 4}
    foreign = mplus.wrap(base, mplus.MPlusConfig(**(SIZES if other == "model" else sizes)))
    file = str(tmp_path / "foreign.mplus")

    async def life() -> None:
        client = serve()
        for name in (ADA, BOB):
            await client.call(MakeMemory(name))
        await tell(client, BOB, STORY * 3)
        with mplus.Memory.open(client.engine._tenants.path(ADA), foreign, tokenizer=decoder.tokenizer) as memory:
            memory.write(STORY * 3, source="told")
            memory.export(file)
        for work in (
            tokens_of(client, ask(decoder, ADA, "Lily")), tell(client, ADA, STORY), client.call(ListSources(ADA)),
        ):  # fmt: skip
            assert await refused(work) == (409, "memory_mismatch")
        assert len(await tokens_of(client, ask(decoder, BOB, "Lily", 3))) == 3
        empty = MemoryName("tests", "empty")
        await client.call(MakeMemory(empty))
        assert await refused(client.call(ImportMemory(empty, file))) == (409, "memory_mismatch")
        assert (await client.call(ListSources(empty)))["data"] == []
        await client.call(DeleteMemory(ADA))  # what cannot be read can be deleted
        await client.call(MakeMemory(ADA))
        await tell(client, ADA, STORY)

    run(life())


def test_deleting_what_is_read_lets_the_answer_end(serve: Serve, decoder: ServedDecoder) -> None:
    async def life() -> None:
        client = serve()
        await client.call(MakeMemory(ADA))
        await tell(client, ADA, STORY * 3)
        whole = await tokens_of(client, ask(decoder, ADA, "Lily", 40))
        stream = client.generate(ask(decoder, ADA, "Lily", 40))
        events = list(await anext(stream))
        deleting = asyncio.ensure_future(client.call(DeleteMemory(ADA)))
        later = asyncio.ensure_future(refused(client.call(ListSources(ADA))))
        async for some in stream:
            events += some
        assert [event.id for event in events if hasattr(event, "id")] == whole
        assert any(isinstance(event, Ended) for event in events)
        assert (await deleting)["deleted"]
        assert await later == (404, "memory_not_found")
        assert not client.engine._tenants.path(ADA).exists()

    run(life())


def test_forgetting_while_it_is_written_forgets_what_was_written_before(serve: Serve) -> None:
    async def life() -> list[Any]:
        client = serve()
        await client.call(MakeMemory(ADA))
        novel = asyncio.ensure_future(tell(client, ADA, STORY * 60, "novel"))
        while not (await client.metrics()).get("write_chunks"):
            await asyncio.sleep(0.005)
        forgotten = client.call(ForgetSource(ADA, "novel"))
        again = tell(client, ADA, STORY * 2, "novel")
        found = await asyncio.gather(novel, forgotten, again, client.call(ListSources(ADA)))
        assert found[1]["chunks"] == found[0]["chunks"]
        assert found[1]["rows"] > 0
        (source,) = found[3]["data"]
        return [source["name"], source["chunks"], found[2]["chunks"]]

    name, held, written = run(life())
    assert (name, held) == ("novel", written)


def test_of_two_makes_at_once_one_is_refused(serve: Serve) -> None:
    async def life() -> None:
        client = serve()
        makes = [client.call(MakeMemory(ADA)) for _ in range(8)] + [client.call(MakeMemory(BOB))]
        found = await asyncio.gather(*makes, return_exceptions=True)
        errors = [one.facts.code for one in found if isinstance(one, Exception)]  # type: ignore[attr-defined]
        assert errors == ["memory_exists"] * 7
        assert [one["id"] for one in (await client.call(ListMemories("tests")))["data"]] == ["ada"]
        await tell(client, ADA, STORY)

    run(life())


def test_a_clock_that_goes_back_disturbs_no_order(
    serve: Serve, decoder: ServedDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    shift = [timedelta()]
    monkeypatch.setattr(transaction, "utc_now", lambda: datetime.now(UTC) + shift[0])

    async def life() -> None:
        client, names = serve(), [f"m{n}" for n in range(3)]
        for day, name in enumerate(names):
            moment = datetime(2026, 6, 20 - day, tzinfo=UTC).timestamp()
            now = SimpleNamespace(time=lambda at=moment: at, time_ns=lambda at=moment: int(at * 1e9))
            monkeypatch.setattr(tenants, "time", now)
            await client.call(MakeMemory(MemoryName("tests", name)))
        assert [one["id"] for one in (await client.call(ListMemories("tests")))["data"]] == names
        memory = MemoryName("tests", "m0")
        await tell(client, memory, STORY, "first", expires=3600.0)
        shift[0] = -timedelta(days=3)
        await client.close()
        client = serve()
        first = await tell(client, memory, STORY, "second", write_id="w")
        again = await tell(client, memory, STORY, "second", write_id="w")
        assert (again["chunks"], again["memory_version"]) == (first["chunks"], first["memory_version"])
        versions = [(await client.call(DescribeMemory(memory)))["version"]]
        await client.close()
        client = serve()
        sources = (await client.call(ListSources(memory)))["data"]
        assert [one["name"] for one in sources] == ["first", "second"]
        assert sources[0]["newest_age"] > 0 == sources[1]["newest_age"]
        versions.append((await client.call(DescribeMemory(memory)))["version"])
        assert versions[1] >= versions[0]
        assert len(await tokens_of(client, ask(decoder, memory, "Lily", 3))) == 3

    run(life())
