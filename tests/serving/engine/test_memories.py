"""Memories of an engine: made, written once, read after what was written before, forgotten; each its tenant's own."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import mplus
from mplus.errors import LiveMemoryError, MemoryFileError
from mplus.serving.config import Limits, ServeConfig
from mplus.serving.drafts import new_draft
from mplus.serving.engine.decoder import ServedDecoder
from mplus.serving.engine.memories.opening import opened_memory
from mplus.serving.engine.memories.tenants import Tenants
from mplus.serving.errors import ServingError
from mplus.serving.messages import (
    Began,
    DeleteMemory,
    DescribeMemory,
    DescribeUsage,
    ExportMemory,
    FlushMemory,
    ForgetSource,
    ForkMemory,
    ImportMemory,
    ListMemories,
    ListSources,
    MakeMemory,
    MemoryName,
    WriteMemory,
)
from tests.memory.disks.disks import Failing, Watched
from tests.serving.engine.conftest import ADA, STORY, Serve, ask, run, tell, tokens_of


async def refused(work: Any) -> tuple[int, str | None]:
    """The status and code that a request is refused with."""
    with pytest.raises(ServingError) as caught:
        await work
    return caught.value.facts.status, caught.value.facts.code


def test_memories_are_made_listed_and_deleted(serve: Serve) -> None:
    async def life() -> None:
        client = serve()
        for name in ("zoe", "Ada", "ada"):
            await client.call(MakeMemory(MemoryName("t", name)))
        assert await refused(client.call(MakeMemory(MemoryName("t", "ada")))) == (409, "memory_exists")
        assert (await client.call(MakeMemory(MemoryName("other", "ada"))))["id"] == "ada"
        page = await client.call(ListMemories("t", limit=2))
        assert ([one["id"] for one in page["data"]], page["has_more"]) == (["zoe", "Ada"], True)
        page = await client.call(ListMemories("t", after="Ada"))
        assert ([one["id"] for one in page["data"]], page["has_more"]) == (["ada"], False)
        await tell(client, MemoryName("t", "ada"), STORY)
        await client.call(DeleteMemory(MemoryName("t", "ada")))
        assert await refused(client.call(ListSources(MemoryName("t", "ada")))) == (404, "memory_not_found")
        await client.call(MakeMemory(MemoryName("t", "ada")))
        assert (await client.call(ListSources(MemoryName("t", "ada"))))["data"] == []
        assert (await client.call(DescribeUsage("t")))["memories"] == 3

    run(life())


@pytest.mark.parametrize("name", ["", "..", "a/b", "a\0", "x" * 129, "a\n", "\u202eada", "-a", " a", "ä"])
def test_ids_that_are_none_are_refused_everywhere(serve: Serve, decoder: ServedDecoder, name: str) -> None:
    async def refusals() -> None:
        client, memory = serve(), MemoryName("t", name)
        for command in (MakeMemory(memory), DescribeMemory(memory), DeleteMemory(memory), WriteMemory(memory, STORY)):
            assert await refused(client.call(command)) == (400, "invalid_memory_id")
        assert await refused(tokens_of(client, ask(decoder, memory, "Lily"))) == (400, "invalid_memory_id")

    run(refusals())


def test_the_default_memory_reads_as_empty_until_it_is_written(serve: Serve, decoder: ServedDecoder) -> None:
    async def life() -> None:
        client, name = serve(), MemoryName("t", "default")
        assert (await client.call(ListSources(name)))["data"] == []
        assert (await client.call(DescribeMemory(name)))["version"] == 0
        empty = await tokens_of(client, ask(decoder, name, "Lily"))
        assert (await client.call(ListMemories("t")))["data"] == []
        await client.call(MakeMemory(ADA))
        assert await tokens_of(client, ask(decoder, ADA, "Lily")) == empty
        await tell(client, name, STORY)
        assert [one["id"] for one in (await client.call(ListMemories("t")))["data"]] == ["default"]

    run(life())


def test_a_read_sees_what_was_written_before_it(serve: Serve, decoder: ServedDecoder) -> None:
    async def work() -> list[Any]:
        client = serve()
        await client.call(MakeMemory(ADA))
        asked: list[Any] = []
        for number in range(4):  # nothing is awaited in between: all of it waits in the engine
            asked += [tell(client, ADA, STORY * 4, f"note {number}"), client.call(ListSources(ADA))]
            asked.append(version_of(client, ask(decoder, ADA, "Lily", 1)))
        return await asyncio.gather(*asked)

    found = run(work())
    for number in range(4):
        written, sources, version = found[3 * number : 3 * number + 3]
        assert f"note {number}" in [source["name"] for source in sources["data"]]
        assert version >= written["memory_version"]


async def version_of(client: Any, request: Any) -> int:
    """The version of the memory that was read."""
    events = [event async for some in client.generate(request) for event in some]
    return next(event.memory_version for event in events if isinstance(event, Began))


def test_a_write_with_an_id_happens_once(serve: Serve) -> None:
    async def writes() -> None:
        client = serve()
        await client.call(MakeMemory(ADA))
        same = [tell(client, ADA, STORY * 5, write_id="w1") for _ in range(3)]
        first, *others = await asyncio.gather(*same)
        assert all(other["chunks"] == first["chunks"] and other["tokens"] == first["tokens"] for other in others)
        assert await refused(tell(client, ADA, "Another one." * 20, write_id="w1")) == (409, "idempotency_key_reused")
        (source,) = (await client.call(ListSources(ADA)))["data"]
        assert (source["chunks"], source["tokens"]) == (first["chunks"], first["tokens"])

    run(writes())


def test_a_text_in_pieces_is_written_as_the_whole(serve: Serve, decoder: ServedDecoder) -> None:
    async def written() -> list[Any]:
        client = serve()
        names = [MemoryName("t", f"m{n}") for n in range(3)]
        for name in names:
            await client.call(MakeMemory(name))
            await tell(client, name, "Hi.", "note")  # waits, and is the beginning of the first chunk
        await asyncio.gather(*(tell(client, name, STORY * (3 + n), "note") for n, name in enumerate(names)))
        await client.call(FlushMemory(names[1]))
        return [(await client.call(ListSources(name)))["data"][0] for name in names]

    found = run(written())
    for n, source in enumerate(found):
        memory = decoder.model.new_memory(tokenizer=decoder.tokenizer)
        memory.write("Hi.", source="note")
        memory.write(STORY * (3 + n), source="note")
        if n == 1:
            memory.flush()
        (own,) = memory.sources()
        assert (source["tokens"], source["chunks"], source["pending"]) == (own.tokens, own.chunks, own.tail_tokens)


def test_sources_are_forgotten_once(serve: Serve) -> None:
    async def forget() -> None:
        client = serve()
        await client.call(MakeMemory(ADA))
        await tell(client, ADA, STORY * 2, "a/b?c#<b>")
        assert (await client.call(ForgetSource(ADA, "a/b?c#<b>")))["rows"] > 0
        assert await refused(client.call(ForgetSource(ADA, "a/b?c#<b>"))) == (404, "source_not_found")
        assert await refused(client.call(ForgetSource(MemoryName("t", "default"), "x"))) == (404, "source_not_found")

    run(forget())


def test_quotas_refuse_before_anything_is_written(serve: Serve) -> None:
    async def full() -> None:
        client = serve(limits=Limits(memories=1, disk_bytes=30_000))
        await client.call(MakeMemory(ADA))
        assert await refused(client.call(MakeMemory(MemoryName("tests", "two")))) == (413, "quota_exceeded")
        assert await refused(tell(client, MemoryName("tests", "default"), STORY)) == (413, "quota_exceeded")
        assert await refused(tell(client, ADA, STORY * 100)) == (413, "quota_exceeded")
        assert (await client.call(ListSources(ADA)))["data"] == []

    run(full())


def test_a_damaged_memory_does_not_keep_the_others_from_being_served(serve: Serve, decoder: ServedDecoder) -> None:
    async def damaged() -> None:
        client, other = serve(open_memories=1), MemoryName("tests", "bob")
        for name in (ADA, other):
            await client.call(MakeMemory(name))
            await tell(client, name, STORY * 3)
        folder = client.engine._tenants.path(ADA)
        for file in folder.glob("*.safetensors"):
            file.write_bytes(file.read_bytes()[:-7] + b"garbage")
        for file in folder.glob("*journal*"):
            file.write_bytes(b"garbage" * 50)
        assert await refused(tokens_of(client, ask(decoder, ADA, "Lily"))) == (409, "memory_damaged")
        assert len(await tokens_of(client, ask(decoder, other, "Lily", 3))) == 3

    run(damaged())


def test_a_memory_is_exported_imported_and_forked(serve: Serve, decoder: ServedDecoder, tmp_path: Path) -> None:
    async def copies() -> None:
        client, file = serve(), str(tmp_path / "ada.mplus")
        twin, third = MemoryName("other", "twin"), MemoryName("tests", "third")
        await client.call(MakeMemory(ADA))
        await tell(client, ADA, STORY * 3)
        await client.call(ExportMemory(ADA, file))
        await client.call(MakeMemory(twin))
        await client.call(ImportMemory(twin, file))
        await client.call(ForkMemory(ADA, "third"))
        assert await refused(client.call(ForkMemory(ADA, "third"))) == (409, "memory_exists")
        assert await refused(client.call(ImportMemory(twin, file))) == (409, "memory_not_empty")
        answers = [await tokens_of(client, ask(decoder, name, "Lily")) for name in (ADA, twin, third)]
        assert answers[0] == answers[1] == answers[2]
        await tell(client, third, "Tom found a box. " * 20)
        names = [[one["name"] for one in (await client.call(ListSources(name)))["data"]] for name in (ADA, third)]
        assert names == [["told"], ["told"]]
        whole = Path(file).read_bytes()
        default = MemoryName("tests", "default")
        for bad in (b"garbage", whole[: len(whole) // 2], whole[:3000] + b"x" + whole[3001:]):
            Path(file).write_bytes(bad)
            assert await refused(client.call(ImportMemory(default, file))) == (400, "invalid_memory_file")
        assert (await client.call(ListSources(default)))["data"] == []

    run(copies())


def test_what_a_crash_has_left_of_a_fork_is_no_memory(serve: Serve, decoder: ServedDecoder, tmp_path: Path) -> None:
    """Its directory is made wholly before it has a name; forking again makes it anew, and a start removes it."""
    copy = MemoryName("tests", "copy")

    async def copied() -> None:
        client = serve()
        await client.call(MakeMemory(ADA))
        await tell(client, ADA, STORY * 3)
        tenants = client.engine._tenants
        for _ in range(2):
            mplus.Memory.open(tenants.path(copy), decoder.model, tokenizer=decoder.tokenizer).close()
            assert await refused(client.call(ListSources(copy))) == (404, "memory_not_found")
            assert [one["id"] for one in (await client.call(ListMemories("tests")))["data"]] == ["ada"]
            await client.call(ForkMemory(ADA, "copy"))
            assert [one["name"] for one in (await client.call(ListSources(copy)))["data"]] == ["told"]
            await client.call(DeleteMemory(copy))
        path = tenants.path(copy)
        with mplus.Memory.open(path, decoder.model, tokenizer=decoder.tokenizer):  # another server makes it now
            Tenants(tenants.root, Limits())
            assert path.exists()
        Tenants(tenants.root, Limits())
        assert not path.exists()
        assert tenants.path(ADA).exists()

    run(copied())


@pytest.mark.parametrize("at", ["from_export", "link"])
def test_a_fork_that_fails_leaves_nothing(serve: Serve, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async def copied() -> None:
        client = serve()
        await client.call(MakeMemory(ADA))
        await tell(client, ADA, STORY * 3)
        before = files_in(tmp := client.engine.config.memories)
        with monkeypatch.context() as patch:
            patch.setattr(*((mplus.Memory, "from_export") if at == "from_export" else (os, "link")), fails)
            assert await refused(client.call(ForkMemory(ADA, "copy"))) == (507, "insufficient_storage")
        assert files_in(tmp) == before
        await client.call(ForkMemory(ADA, "copy"))

    run(copied())


def test_of_memories_made_at_once_no_more_are_made_than_a_tenant_may_have(serve: Serve) -> None:
    async def made() -> None:
        client = serve(limits=Limits(memories=5))
        makes = [client.call(MakeMemory(MemoryName("tests", f"m{n}"))) for n in range(24)]
        found = await asyncio.gather(*makes, return_exceptions=True)
        errors = [one.facts.code for one in found if isinstance(one, ServingError)]
        assert errors == ["quota_exceeded"] * 19
        assert len((await client.call(ListMemories("tests")))["data"]) == 5

    run(made())


def test_closing_does_not_wait_for_a_novel(serve: Serve) -> None:
    async def closed() -> list[Any]:
        client = serve()
        await client.call(MakeMemory(ADA))
        novel = asyncio.ensure_future(tell(client, ADA, STORY * 4000, write_id="novel"))
        while not (await client.metrics()).get("write_chunks"):
            await asyncio.sleep(0.01)
        await asyncio.to_thread(client.engine.close, 0)
        assert await refused(novel) == (503, "shutting_down")
        again = serve()
        return list((await again.call(ListSources(ADA)))["data"])

    (source,) = run(closed())
    assert 0 < source["chunks"] < 2000


def files_in(root: Path) -> list[str]:
    """The names of all files but that which says with which version new memories begin."""
    return sorted(file.name for file in root.rglob("*") if file.is_file() and "versions-from" not in file.name)


class Crash(Exception):
    """The process has ended here."""


class Crashing(Watched):
    """Ends at the ``at``-th call that changes something."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def before(self, call: int, what: str) -> None:
        if call == self.at:
            raise Crash


def test_a_crash_leaves_a_deleted_memory_whole_or_takes_its_words(decoder: ServedDecoder, tmp_path: Path) -> None:
    """At every step of the deletion; the next start removes what was deleted, and deleting again ends it."""
    made = tmp_path / "made"
    path = Tenants(made, Limits()).path(ADA)
    Tenants(made, Limits()).make(ADA)
    with mplus.Memory.open(path, decoder.model, tokenizer=decoder.tokenizer, keep_text=True) as memory:
        memory.write(STORY, source="said")
    whole = sorted(file.name for file in path.iterdir())
    told = opened_memory(path, decoder, ServeConfig(memories=made))[1]
    for step in range(1, 100):
        root = tmp_path / str(step)
        shutil.copytree(made, root)
        files = Crashing(step)
        try:
            Tenants(root, Limits(), files).remove(ADA)
        except Crash:
            pass
        else:
            break
        again = Tenants(root, Limits())
        if again.path(ADA).exists():
            assert sorted(file.name for file in again.path(ADA).iterdir()) == whole
        else:
            assert files_in(root) in ([], [again.path(ADA).name + ".json"])
        assert again.find(ADA) is not None or not again.path(ADA).exists()
        if again.find(ADA) is not None and not again.path(ADA).exists():
            assert again.opening(ADA)[1] > told, "it is empty now, under a version of its own"
        again.remove(ADA)
        assert again.find(ADA) is None
        assert files_in(root) == []
        assert again.make(ADA).first > told
    assert step > 5


def test_a_deletion_that_fails_leaves_the_memory_or_says_what_is_left(
    decoder: ServedDecoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files, outcomes = Failing(), set()
    tenants = Tenants(tmp_path, Limits(), files)
    for step in range(1, 100):
        tenants.make(ADA)
        path = tenants.path(ADA)
        with mplus.Memory.open(path, decoder.model, tokenizer=decoder.tokenizer), pytest.raises(LiveMemoryError):
            tenants.remove(ADA)
        caplog.clear()
        files.fail(step, lasting=False, late=False)
        try:
            tenants.remove(ADA)
        except (MemoryFileError, OSError):
            outcomes.add("refused")
            assert (tenants.find(ADA) is None) <= (not path.exists())
        else:
            outcomes.add("left" if "still there" in caplog.text else "gone")
            assert tenants.find(ADA) is None
        struck, files.at = files.failed, 0
        if tenants.find(ADA) is not None:
            tenants.remove(ADA)
        Tenants(tmp_path, Limits())
        assert files_in(tmp_path) == []
        if not struck:
            break
    assert outcomes == {"refused", "left", "gone"}


def test_files_of_requests_that_a_crash_ended_are_removed(tmp_path: Path) -> None:
    left, present = new_draft(tmp_path), new_draft(tmp_path)
    os.utime(left, (0, 0))
    Tenants(tmp_path, Limits())
    assert not left.exists()
    assert present.exists()
    os.utime(present, (0, 0))
    new_draft(tmp_path)
    assert not present.exists()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"id": 1'])
def test_a_damaged_manifest_is_told_and_hides_no_other(tmp_path: Path, content: str) -> None:
    tenants, other = Tenants(tmp_path, Limits()), MemoryName(ADA.tenant, "other")
    tenants.make(ADA)
    tenants.make(other)
    tenants.path(ADA).with_suffix(".json").write_text(content)
    with pytest.raises(ServingError, match="damaged") as caught:
        tenants.find(ADA)
    assert (caught.value.facts.status, caught.value.facts.code) == (409, "memory_damaged")
    assert [made.id for made in tenants.all(ADA.tenant)] == ["other"]
