"""FairQueue and Pace: what is next, and how much of it, without a decoder."""

from __future__ import annotations

import asyncio

import pytest

from mplus.serving.engine.answers.fair import AHEAD, FairQueue
from mplus.serving.engine.answers.pace import MOST, SMALLEST, Pace
from mplus.serving.errors import ServingError
from tests.serving.engine.conftest import run


async def admitted(queue: FairQueue, asked: list[tuple[str, int, int]]) -> list[str]:
    """Ask in this order, let one leave at a time, and return the tenants in the order in which they were let in."""
    order: list[str] = []

    async def one(tenant: str, rows: int, cost: int) -> None:
        await queue.admit(tenant, rows, cost)
        order.append(tenant)
        await asyncio.sleep(0)
        queue.leave(tenant, rows)

    await asyncio.gather(*(one(*each) for each in asked))
    return order


def test_tenants_share_tokens_and_not_requests() -> None:
    asked = [("first", 1, 1)] * (2 + 2) + [("small", 1, 100)] * 20 + [("large", 1, 1000)] * 20
    order = run(admitted(FairQueue(1, 100), asked))
    both = [tenant for tenant in order if tenant != "first"][:22]
    assert 1 <= both.count("large") <= 4
    assert len(order) == len(asked)


def test_no_tenant_has_all_rows_where_there_are_others() -> None:
    async def held() -> tuple[int, int]:
        queue = FairQueue(16, 100)
        tasks = [asyncio.ensure_future(queue.admit("one", 1, 10)) for _ in range(40)]
        await asyncio.sleep(0)
        alone = sum(task.done() for task in tasks)
        other = asyncio.ensure_future(queue.admit("two", 1, 10))
        await asyncio.sleep(0)
        for _ in range(alone):
            queue.leave("one", 1)
        await asyncio.sleep(0)
        beside = sum(task.done() for task in tasks) - alone
        assert other.done()
        for task in tasks:
            task.cancel()
        return alone, beside

    assert run(held()) == (16 + AHEAD, 14)


def test_who_is_cancelled_in_the_queue_holds_no_place() -> None:
    async def cancelled() -> None:
        queue = FairQueue(1, 100)
        first = [asyncio.ensure_future(queue.admit("a", 1, 1)) for _ in range(4)]
        await asyncio.sleep(0)
        assert [task.done() for task in first] == [True, True, False, False]
        first[2].cancel()
        await asyncio.sleep(0)
        queue.leave("a", 1)
        await asyncio.sleep(0)
        assert first[3].done()

    run(cancelled())


def test_more_than_may_wait_are_refused() -> None:
    queue = FairQueue(1, 2)
    begin, _ = queue.arrive("a"), queue.arrive("a")
    with pytest.raises(ServingError) as caught:
        queue.arrive("a")
    assert caught.value.facts.status == 429
    queue.arrive("b")
    begin()
    begin()  # does nothing any more
    queue.arrive("a")
    assert queue.waiting == 3


def test_what_is_read_in_a_turn_follows_what_it_took() -> None:
    pace = Pace(0.05)
    for _ in range(50):
        tokens = pace.tokens(answering=True)
        pace.read(tokens, 0.01 + tokens * 1e-4, answering=True)
    assert 350 <= pace.tokens(answering=True) <= 450  # .05 s
    pace.read(10, 1e-6, answering=True)  # says nothing of more
    assert 350 <= pace.tokens(answering=True) <= 450
    for _ in range(20):
        pace.read(pace.tokens(answering=True), 9.0, answering=True)
    assert pace.tokens(answering=True) == SMALLEST
    assert pace.prompts(answering=True) == 1, "each costs what its memory is asked, however short"
    for several in (1, 2, 4, 8):
        pace.read(SMALLEST, 1e-4, answering=True, prompts=several)
    assert pace.prompts(answering=True) == 16
    pace.read(SMALLEST, 1e-4, answering=True, prompts=3)  # says nothing of more
    assert pace.prompts(answering=True) == 16
    for _ in range(30):
        pace.read(pace.tokens(answering=False), 1e-4, answering=False)
    assert pace.tokens(answering=False) == MOST
    pace.stepped(1.0)
    pace.wrote(2, 1.0)
    assert pace.chunks(answering=True) >= 1
