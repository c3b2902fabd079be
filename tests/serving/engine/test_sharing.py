"""What users share is the decoder alone: no value crosses, nobody keeps others waiting, and who leaves makes room."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
import torch
from torch import nn

from mplus.hf.pretrained.shipped import load_recall
from mplus.serving.config import Limits, ServeConfig
from mplus.serving.engine.client import InProcessEngine
from mplus.serving.engine.decoder import ServedDecoder
from mplus.serving.errors import ServingError
from mplus.serving.messages import (
    Began,
    DescribeMemory,
    Ended,
    EndRow,
    Generate,
    ListSources,
    MakeMemory,
    MemoryName,
    NewToken,
    Sampling,
)
from tests.serving.engine.conftest import ADA, STORY, Serve, ask, run, tell, tokens_of

ENDLESS = {"sampling": {"max_tokens": None}, "tokens": 0}
TOWNS = ("berlin", "oslo", "paris", "rome", "lima", "turin")


def test_equal_sources_with_other_values_never_cross(tmp_path: Any) -> None:
    model, tokenizer = load_recall()
    decoder = ServedDecoder.of(model, tokenizer, "recall-tiny")
    names = [MemoryName(f"tenant{n % 2}", f"user{n}") for n in range(6)]
    ids = tokenizer("town of ada miller", add_special_tokens=False)["input_ids"]

    async def asked() -> list[str]:
        client = InProcessEngine(decoder, ServeConfig(memories=tmp_path))
        try:
            for name in names:
                await client.call(MakeMemory(name))
            facts = [f"town of ada miller {town} . pet of max fisher owl ." for town in TOWNS]
            await asyncio.gather(*(tell(client, *one, "same") for one in zip(names, facts, strict=True)))
            requests = [Generate(name.tenant, name, ids, sampling=Sampling(1, 0.0)) for name in names]
            found = await asyncio.gather(*(tokens_of(client, one) for one in requests * 3))
        finally:
            await asyncio.to_thread(client.engine.close, 0)
        return [tokenizer.decode(tokens) for tokens in found]

    for n, answer in enumerate(run(asked())):
        assert answer.strip() == TOWNS[n % 6]


def test_one_with_many_requests_does_not_keep_another_waiting(serve: Serve, decoder: ServedDecoder) -> None:
    async def flood() -> tuple[list[Any], float]:
        client = serve(max_batch=4)
        many = [asyncio.ensure_future(tokens_of(client, ask(decoder, None, "Lily", 40))) for _ in range(200)]
        await asyncio.sleep(0)
        other = Generate("other", None, [5, 6], sampling=Sampling(4, 0.0, ignore_end=True))
        assert len(await tokens_of(client, other)) == 4
        over = sum(one.done() and not one.exception() for one in many)
        return await asyncio.gather(*many, return_exceptions=True), over

    found, over = run(flood())
    refused = [one for one in found if isinstance(one, ServingError)]
    assert all(one.facts.status == 429 and one.facts.retry_after == 1 for one in refused)
    assert len(refused) in range(200 - 32 - 20, 200 - 32 + 1)  # some begin while others come
    assert over < 20  # of those of the other tenant


@pytest.mark.parametrize("places", [1, 4])
def test_who_leaves_makes_room_at_once(serve: Serve, decoder: ServedDecoder, places: int) -> None:
    async def leave() -> None:
        client = serve(max_batch=places)
        streams = [client.generate(ask(decoder, None, "Lily", 400)) for _ in range(places)]
        for stream in streams:
            await anext(stream)
        queued = asyncio.ensure_future(tokens_of(client, ask(decoder, None, "Tom", 300)))
        await asyncio.sleep(0.05)
        queued.cancel()  # leaves in the queue
        begun = time.perf_counter()
        for stream in streams:
            await stream.aclose()
        while (numbers := await client.metrics())["requests_running"] or numbers["requests_waiting"]:
            assert time.perf_counter() - begun < 30
            await asyncio.sleep(0)
        assert numbers["cancelled"] == places + 1
        assert len(await tokens_of(client, ask(decoder, None, "Tom", 3))) == 3

    run(leave())


def test_a_bad_row_fails_alone(serve: Serve, decoder: ServedDecoder) -> None:
    async def work() -> list[Any]:
        client = serve()
        await client.call(MakeMemory(ADA))
        await tell(client, ADA, STORY * 3)
        good = [ask(decoder, ADA, "Lily", 5), ask(decoder, None, "Tom", 5)]
        bad = [
            Generate("t", ADA, []),
            Generate("t", ADA, [10**9]),
            Generate("t", ADA, [-1]),
            Generate("t", ADA, [5] * 5000),
            Generate("t", ADA, [5], question=[]),
            Generate("t", MemoryName("t", "none"), [5]),
            Generate("t", ADA, [5], min_score=0.5),
            Generate("t", "no name", [5]),  # type: ignore[arg-type]
        ]
        asked = [good[0], *bad, good[1]]
        return await asyncio.gather(*(tokens_of(client, one) for one in asked), return_exceptions=True)

    first, *errors, last = run(work())
    assert len(first) == len(last) == 5
    assert [error.facts.status for error in errors] == [400, 400, 400, 400, 400, 404, 400, 500]
    assert errors[3].facts.code == "context_length_exceeded"


def test_numbers_that_are_not_finite_end_their_own_row(serve: Serve, decoder: ServedDecoder) -> None:
    async def work() -> list[Any]:
        client = serve()
        batch = client.engine._batch
        whole = batch._reader.step

        def spoilt(tokens: Any) -> torch.Tensor:
            logits = whole(tokens)
            for place, row in enumerate(batch._reader.rows):
                if row.request.ids[0] == 7:
                    logits[place] = torch.nan
            return logits

        batch._reader.step = spoilt  # type: ignore[method-assign]
        asked = [Generate("t", None, ids, sampling=Sampling(6, 0.0, ignore_end=True)) for ids in ([5, 6], [7], [8])]
        return await asyncio.gather(*(tokens_of(client, one) for one in asked), return_exceptions=True)

    first, error, last = run(work())
    assert len(first) == len(last) == 6
    assert error.facts.status == 500


def test_idle_memories_are_closed_and_read_the_same_again(serve: Serve, decoder: ServedDecoder) -> None:
    names = [MemoryName("tests", f"m{n}") for n in range(6)]

    async def work() -> None:
        client = serve(open_memories=2)
        for n, name in enumerate(names):
            await client.call(MakeMemory(name))
            await tell(client, name, f"{STORY} Number {n}. " * 3)
        before = await asyncio.gather(*(tokens_of(client, ask(decoder, name, "Lily")) for name in names))
        versions = [(await client.call(DescribeMemory(name)))["version"] for name in names]
        await asyncio.gather(*(client.call(ListSources(name)) for name in names * 3))
        after = await asyncio.gather(*(tokens_of(client, ask(decoder, name, "Lily")) for name in names))
        assert after == before
        assert [(await client.call(DescribeMemory(name)))["version"] for name in names] == versions
        numbers = await client.metrics()
        assert numbers["evictions"] >= 4
        assert numbers["open_memories"] <= 2
        await client.close()
        again = serve()
        found = await asyncio.gather(*(tokens_of(again, ask(decoder, name, "Lily")) for name in names))
        assert found == before

    run(work())


def test_more_answers_than_places(serve: Serve, decoder: ServedDecoder) -> None:
    async def rows() -> list[Any]:
        client = serve(max_batch=2)
        request = ask(decoder, None, "Lily", 4, answers=5, sampling={"temperature": 1.0, "seed": 7})
        return [event async for some in client.generate(request) for event in some]

    found = run(rows())
    assert sorted(event.row for event in found if isinstance(event, Ended)) == [0, 1, 2, 3, 4]
    assert sum(isinstance(event, Began) for event in found) == 1


def test_a_row_that_is_ended_makes_room_and_the_others_go_on(serve: Serve, decoder: ServedDecoder) -> None:
    async def rows() -> tuple[list[Any], Any]:
        client, found = serve(max_batch=3), []
        request = ask(decoder, None, "Lily", 60, answers=3)
        other: asyncio.Task[Any] | None = None
        async for some in client.generate(request):
            found += some
            if other is None and sum(isinstance(event, NewToken) for event in found) >= 6:
                await client.call(EndRow(request.id, 1))
                await client.call(EndRow("of nobody", 0))
                numbers = await client.metrics()
                assert numbers["requests_running"] == 2
                other = asyncio.ensure_future(tokens_of(client, ask(decoder, None, "Tom", 5)))
        assert other is not None
        return found, await other

    found, other = run(rows())
    counts = [sum(isinstance(event, NewToken) and event.row == row for event in found) for row in range(3)]
    assert counts[0] == counts[2] == 60
    assert 2 <= counts[1] < 30
    assert sorted(event.row for event in found if isinstance(event, Ended)) == [0, 1, 2]
    assert len(other) == 5


def test_closing_ends_what_runs_with_an_error(serve: Serve, decoder: ServedDecoder) -> None:
    async def work() -> tuple[int, int]:
        client = serve(limits=Limits(waiting=8))
        stream = client.generate(ask(decoder, None, "Lily", 400))
        await anext(stream)
        await asyncio.to_thread(client.engine.close, 0)
        with pytest.raises(ServingError) as running:
            async for _ in stream:
                pass
        return running.value.facts.status, 0

    assert run(work())[0] == 503


def test_the_decoder_is_as_it_was(decoder: ServedDecoder) -> None:
    assert isinstance(decoder.model, nn.Module)
    assert not decoder.model.training
