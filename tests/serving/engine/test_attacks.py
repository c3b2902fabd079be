"""What would take the engine from everybody: a loop that fails, texts that take all threads, room that is given twice;
and values at the edges of what may be asked for."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mplus.errors import MemoryFileError, MemoryFullError
from mplus.serving.config import Limits
from mplus.serving.engine.answers.sampling import Draws, choose
from mplus.serving.engine.decoder import ServedDecoder
from mplus.serving.engine.memories.writer import Writer
from mplus.serving.engine.memories.writing import MemoryWrite
from mplus.serving.engine.refusals import refusal
from mplus.serving.errors import ServingError
from mplus.serving.messages import ListSources, MakeMemory, MemoryName, Sampling
from tests.serving.engine.conftest import ADA, STORY, Serve, ask, run, tell, tokens_of
from tests.serving.engine.test_memories import refused


def test_an_engine_whose_loop_fails_tells_everybody_and_ends(serve: Serve, decoder: ServedDecoder) -> None:
    """Nobody would be answered any more: the process of an engine ends with it, and another one is started."""

    async def failed() -> None:
        client = serve()
        await client.call(MakeMemory(ADA))
        stream = client.generate(ask(decoder, ADA, "Lily", 400))
        await anext(stream)

        def fails(*_: Any) -> None:
            raise RuntimeError("nobody has thought of this")

        client.engine._batch.read = fails  # type: ignore[method-assign]
        assert await refused(tokens_of(client, ask(decoder, ADA, "Tom"))) == (503, "engine_failed")
        assert await refused(over(stream)) == (503, "engine_failed")
        await asyncio.to_thread(client.engine.wait)
        assert not client.engine.is_alive
        assert await refused(client.call(ListSources(ADA))) == (503, "engine_failed")
        assert (await serve().call(ListSources(ADA)))["data"] == []  # its memories were closed

    run(failed())


async def over(stream: Any) -> None:
    """Hear a stream to its end."""
    async for _ in stream:
        pass


def test_texts_that_take_long_to_read_keep_only_their_tenant_waiting(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, whole = threading.Event(), MemoryWrite.of

    def slow(memory: Any, asked: Any, now: Any) -> MemoryWrite:
        if asked.source == "slow":
            assert held.wait(60)
        return whole(memory, asked, now)

    monkeypatch.setattr(MemoryWrite, "of", slow)

    async def work() -> None:
        client, names = serve(), [MemoryName("many", f"m{n}") for n in range(20)]
        for name in (*names, ADA):
            await client.call(MakeMemory(name))
        slow_ones = [asyncio.ensure_future(tell(client, name, STORY, "slow")) for name in names]
        await asyncio.sleep(0.2)
        begun = time.perf_counter()
        await asyncio.wait_for(tell(client, ADA, STORY), 30)
        assert [one["name"] for one in (await client.call(ListSources(ADA)))["data"]] == ["told"]
        assert time.perf_counter() - begun < 30
        held.set()
        await asyncio.gather(*slow_ones)

    try:
        run(work())
    finally:
        held.set()


def test_writes_at_once_do_not_each_have_all_the_room(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    names, whole = [MemoryName("tests", f"m{n}") for n in range(6)], Writer.write
    begun: list[MemoryWrite] = []

    async def together(self: Writer, write: MemoryWrite) -> None:
        begun.append(write)
        await asyncio.sleep(0.5)  # until all others have asked for room
        await whole(self, write)

    monkeypatch.setattr(MemoryWrite, "bytes", property(lambda _: 10**6))
    monkeypatch.setattr(Writer, "write", together)

    async def written() -> list[Any]:
        client = serve(limits=Limits(disk_bytes=2_900_000))
        for name in names:
            await client.call(MakeMemory(name))
            await client.call(ListSources(name))
        found = await asyncio.gather(*(tell(client, name, STORY) for name in names), return_exceptions=True)
        await tell(client, names[0], STORY)  # their room is free again
        return [one.facts.code for one in found if isinstance(one, ServingError)]

    assert run(written()) == ["quota_exceeded"] * 4
    assert len(begun) == 3


def test_a_time_that_no_calendar_has_is_refused(serve: Serve) -> None:
    async def work() -> None:
        client = serve()
        await client.call(MakeMemory(ADA))
        for expires in ("9999-12-31T23:59:59-14:00", "0001-01-01T00:00:00+14:00", "2026-13-01T00:00:00Z", "soon"):
            assert (await refused(tell(client, ADA, STORY, expires=expires)))[0] == 400
        assert (await client.call(ListSources(ADA)))["data"] == []

    run(work())


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-5])
def test_a_temperature_next_to_nothing_takes_the_best(temperature: float) -> None:
    logits = torch.tensor([[1.0, 9.0, 3.0, -2.0], [-30.0, -40.0, -31.0, -90.0]])
    found = choose(logits, [Draws.of(Sampling(4, temperature, seed=3), row) for row in range(2)])
    assert [one.id for one in found if one is not None] == [1, 0]


def test_rows_of_a_negative_seed_draw_each_for_itself() -> None:
    draws = [Draws.of(Sampling(4, seed=-2), row).random.random() for row in range(5)]
    assert len(set(draws)) == 5


@pytest.mark.parametrize("root", ["/srv/my memories", "/srv/mplus", "memories here"])
def test_no_error_names_a_path_of_the_server(root: str) -> None:
    folder = Path(root)
    for path in (folder / "ab" / "cd", folder.absolute() / "ab" / "cd" / "manifest.json", folder):
        message = refusal(MemoryFileError(f"{path} must be readable, got '{path}': put back {path}."), folder).message
        assert "srv" not in message
        assert "here" not in message
        assert "manifest" not in message
        assert message.endswith("must be readable, got 'the memory': put back the memory.")


@pytest.mark.parametrize(
    ("message", "status", "code"),
    [
        ("the disk of x must have 9 bytes free for 5 to be imported, got 1", 507, "insufficient_storage"),
        ("RAM must have 9 bytes free, got 1: forget, or give the memory a bytes_budget", 507, "insufficient_storage"),
        ("9 of the 9 long-term rows are of pinned sources; nothing was written", 413, "quota_exceeded"),
    ],
)  # fmt: skip
def test_whose_room_is_at_an_end(message: str, status: int, code: str) -> None:
    facts = refusal(MemoryFullError(message)).facts
    assert (facts.status, facts.code) == (status, code)
