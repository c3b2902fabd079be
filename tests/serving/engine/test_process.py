"""The engine in a process of its own: started again where it dies, and what was written is there again."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from mplus.hf.pretrained.shipped import RECALL_TINY
from mplus.serving.config import ServeConfig
from mplus.serving.engine.process import ProcessEngine
from mplus.serving.engine.source import DecoderSource
from mplus.serving.errors import ServingError
from mplus.serving.messages import Generate, ListSources, MakeMemory, Sampling
from tests.serving.engine.conftest import ADA, run, tell

NOVEL = "Mary went to the garden. John took the ball. " * 150


async def loaded(client: ProcessEngine) -> None:
    """Wait until the decoder is there."""
    while True:
        try:
            await client.model()
        except ServingError:
            await asyncio.sleep(0.05)
        else:
            return


def test_an_engine_that_is_killed_is_started_again(tmp_path: Path) -> None:
    async def killed() -> None:
        client = ProcessEngine(DecoderSource(str(RECALL_TINY), threads=1), ServeConfig(memories=tmp_path))
        try:
            assert (await asyncio.to_thread(client.wait)).mechanism == "mplus"
            await client.call(MakeMemory(ADA))
            await tell(client, ADA, "Mary went to the garden. " * 20)
            stream = client.generate(Generate("t", ADA, [5, 6, 7], sampling=Sampling(400, 0.0, ignore_end=True)))
            assert await anext(stream)
            written = (await client.metrics())["write_chunks"]
            novel = asyncio.ensure_future(tell(client, ADA, NOVEL, "novel", write_id="once"))
            while (await client.metrics())["write_chunks"] < written + 3:
                await asyncio.sleep(0)
            before = client.pid
            assert before is not None
            os.kill(before, signal.SIGKILL)
            with pytest.raises(ServingError) as caught:
                async for _ in stream:
                    pass
            assert caught.value.facts.status == 503
            with pytest.raises(ServingError):
                await novel
            with pytest.raises(ServingError):
                await client.call(ListSources(ADA))
            await loaded(client)
            assert client.pid != before
            found: Any = await client.call(ListSources(ADA))
            told, novel_now = found["data"]
            assert (told["name"], novel_now["name"]) == ("told", "novel")
            report = await tell(client, ADA, NOVEL, "novel", write_id="once")  # goes on where it was
            assert 0 < novel_now["tokens"] < report["tokens"]
            again: Any = await client.call(ListSources(ADA))
            assert again["data"][1]["tokens"] == report["tokens"]
            assert (await client.metrics())["open_memories"] == 1
        finally:
            await client.close(0)

    run(killed())
