"""Several threads on one decoder: each gets what it would get alone.

The decoder's adapters are random, so a thread that ran with another one's adapter, marks or memory would show.
"""

from __future__ import annotations

import sys
import threading
import time
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.helpers.modes import on_every_change
from tests.memory import tiny

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from mplus.memory import Memory

pytestmark = pytest.mark.two_computations

GENERATIONS = on_every_change(35, nightly=100)
TOKENS = 3


@pytest.fixture(autouse=True)
def hasty() -> Iterator[None]:
    """Threads take turns a hundred times as often as usual."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(before / 100)
    yield
    sys.setswitchinterval(before)


@pytest.fixture(params=["paper", "published"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def together(*work: Callable[[], None]) -> None:
    """Run all of ``work`` at once; raise what any of it raises."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(work))

    def run(one: Callable[[], None]) -> None:
        try:
            start.wait()
            one()
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(one,)) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def answer(name: str, prompt: Tensor, memory: Memory | None) -> list[Any]:
    """Generated tokens and the scores they were chosen by."""
    result = tiny.variant(name).generate(
        prompt, memory=memory, max_new_tokens=TOKENS, return_dict_in_generate=True, output_scores=True
    )
    return [result.sequences, torch.stack(result.scores)]


def equal(one: list[Any], other: list[Any]) -> bool:
    """Equal tokens, and scores up to the rounding of another order of sums."""
    return torch.equal(one[0], other[0]) and bool((one[1] - other[1]).abs().max() < tiny.rounding())


def test_two_readers_and_a_writer() -> None:
    name = "paper"
    first, second, written = tiny.written(name, [150]), tiny.written(name, [90, 140], 7), tiny.written(name, [60], 9)
    alone = written.fork()
    before = [tiny.content(first), tiny.content(second)]
    prompts = [[tiny.prompts(memory.batch_size, 5 + i, 50 * i) for i in range(5)] for memory in (first, second)]
    expected = [[answer(name, p, memory) for p in ps] for ps, memory in zip(prompts, (first, second), strict=True)]
    assert not equal(expected[0][0], answer(name, prompts[0][0], None)), "the memory matters"
    wrong: list[tuple[int, int]] = []
    reading = [True, True]
    chunks = 0

    def reader(number: int, memory: Memory) -> None:
        try:
            for turn in range(GENERATIONS):
                which = turn % len(prompts[number])
                if not equal(answer(name, prompts[number][which], memory), expected[number][which]):
                    wrong.append((number, turn))
        finally:
            reading[number] = False

    def writer() -> None:
        nonlocal chunks
        while any(reading) and chunks < 2000:
            written.write(tiny.ids(16, chunks), source="thread")
            chunks += 1

    together(lambda: reader(0, first), lambda: reader(1, second), writer)
    assert wrong == []
    assert chunks > 10, "the writer was at work all the time"
    for chunk in range(chunks):
        alone.write(tiny.ids(16, chunk), source="thread")
    tiny.assert_same(written, alone)
    tiny.assert_content(first, before[0])
    tiny.assert_content(second, before[1])


def test_a_reader_sees_one_state_of_a_memory_that_is_being_written(name: str) -> None:
    model, chunks, prompt = tiny.variant(name), on_every_change(20, nightly=40), tiny.prompts(1)
    memory = tiny.written(name, [60])
    shadow, states = memory.fork(), []
    for chunk in range(chunks + 1):
        states.append(answer(name, prompt, shadow))
        if chunk < chunks:
            shadow.write(tiny.ids(16, chunk))
    gaps = [(one[1] - other[1]).abs().max() for one, other in pairwise(states)]
    assert min(gaps) > 1e-2, "each state answers differently"
    seen: list[int] = []
    base = model(prompt).logits
    writing = threading.Event()
    writing.set()

    def writer() -> None:
        try:
            for chunk in range(chunks):
                memory.write(tiny.ids(16, chunk))
                deadline = time.monotonic() + 20  # a busy machine may let the reader wait for long
                while len(seen) <= chunk // 4 and time.monotonic() < deadline:
                    time.sleep(0.001)
        finally:
            writing.clear()

    def reader() -> None:
        while writing.is_set():
            found = answer(name, prompt, memory)
            seen.append(next(number for number, state in enumerate(states) if equal(found, state)))

    def without() -> None:
        while writing.is_set():
            assert (model(prompt).logits - base).abs().max() < tiny.rounding(), "no adapter acts without a memory"

    together(writer, reader, without)
    assert seen == sorted(seen)
    assert len(set(seen)) > 3, "the reader saw the memory change"
    tiny.assert_same(memory, shadow)


def test_writers_of_one_memory_take_turns() -> None:
    memory = tiny.variant("paper").new_memory(batch_size=2)
    together(*(lambda n=n: memory.write(tiny.prompts(2, 64, n), source=f"{n}") for n in range(3)))  # type: ignore[misc]
    assert {source.name: (source.tokens, source.chunks) for source in memory.sources()} == dict.fromkeys("012", (64, 4))
    assert memory.states[0].clock == 3 * 4 * tiny.K
    numbers = memory.stores[0].column(0, "source")
    assert numbers is not None
    births = memory.stores[0].column(0, "birth")
    assert births is not None
    rows = sorted(zip(births.tolist(), numbers.tolist(), strict=True))
    changes = sum(one[1] != other[1] for one, other in pairwise(rows))
    assert changes <= 2, "one write after the other, not chunk by chunk"


def test_forks_and_saves_while_it_is_written(tmp_path: Any) -> None:
    model, memory, chunks = tiny.variant("paper"), tiny.written("paper", [60]), 30
    shadow, contents = memory.fork(), []
    for chunk in range(chunks + 1):
        contents.append(tiny.content(shadow))
        shadow.write(tiny.ids(16, chunk))
    done = threading.Event()

    def known(copy: Memory, names: list[str]) -> bool:
        """Whether it is one of the states but for ``names``; a save drops sources that nothing is held of."""
        found = tiny.content(copy)
        clock, sources = found["0.clock"], found["0.sources"]
        return any(
            content["0.clock"] == clock
            and tiny.difference(found, content) in ([], names)
            and all(content["0.sources"][number] == source for number, source in sources.items())
            for content in contents
        )

    def writer() -> None:
        for chunk in range(chunks):
            memory.write(tiny.ids(16, chunk))
        done.set()

    def copier() -> None:
        while not done.is_set():
            assert known(memory.fork(), [])

    def saver() -> None:
        while not done.is_set():
            memory.save(tmp_path)
            assert known(type(memory).load(tmp_path, model), ["0.sources"])

    together(writer, copier, saver)
    tiny.assert_content(memory, contents[-1])
