"""Ctrl-C, or any failure, at any point of a change leaves a valid memory: the chunks before it and no half of one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from mplus.eviction.base import FifoEviction
from tests.helpers.modes import on_every_change
from tests.memory import tiny
from tests.memory.interruption import interrupted_by_signals, interrupted_everywhere

if TYPE_CHECKING:
    from collections.abc import Callable

    from mplus.memory import Memory

CHUNKS = 3
TEXT = tiny.ids(16 * CHUNKS, 77)


class At:
    """Stands in for a function and raises at its n-th call, before or after doing its work."""

    def __init__(self, inner: Callable[..., Any], call: int, after: bool = False) -> None:
        self.inner, self.left, self.after = inner, call, after

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if self.left == 0 and not self.after:
            raise KeyboardInterrupt
        result = self.inner(*args, **kwargs)
        if self.left == 0:
            raise KeyboardInterrupt
        return result


def stages(memory: Memory) -> list[dict[str, Any]]:
    """What a copy of the memory holds after 0, 1, 2 and 3 chunks of the text."""
    copy = memory.fork()
    found = [tiny.content(copy)]
    for chunk in TEXT.split(16):
        copy.write(chunk, source="late")
        found.append(tiny.content(copy))
    return found


def check_at(memory: Memory, expected: list[dict[str, Any]], chunks: int) -> None:
    """The memory holds so many chunks, and the rest written now makes it what it would have been."""
    tiny.assert_content(memory, expected[chunks])
    if chunks < CHUNKS:
        memory.write(TEXT[16 * chunks :], source="late")
    tiny.assert_content(memory, expected[-1])


@pytest.fixture(scope="module")
def full() -> Memory:
    memory = tiny.written("paper", [240])
    assert memory.stores[0].count(0) == tiny.CAPACITY, "every write drops and evicts"
    return memory


@pytest.fixture(scope="module")
def expected(full: Memory) -> list[dict[str, Any]]:
    return stages(full)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("chunk", "layer"), [(1, 1), (1, 3), (2, 2), (3, 1), (3, 3)])
@pytest.mark.parametrize("place", ["write", "append", "remove", "evict", "keys"])
def test_interrupted_inside(
    place: str,
    chunk: int,
    layer: int,
    after: bool,
    full: Memory,
    expected: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = full.fork()
    owner, name = {
        "write": (memory.engine, "write"),
        "append": (memory.stores[0], "append"),
        "remove": (memory.stores[0], "remove"),
        "evict": (memory.streams.eviction, "select"),
        "keys": (memory.engine, "keys"),
    }[place]
    call = chunk if place == "write" else 3 * (chunk - 1) + layer
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, At(getattr(owner, name), call, after))
        with pytest.raises(KeyboardInterrupt):
            memory.write(TEXT, source="late")
    assert memory.version == chunk - 1
    check_at(memory, expected, chunk - 1)


def test_interrupted_between_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams with unequally many rows are written one after the other: each has its chunk whole, or not at all."""
    memory = tiny.variant("paper").new_memory(batch_size=2)
    memory.write([TEXT, TEXT[:16]])
    first, both = memory.fork(), memory.fork()
    first.write([TEXT[:16], None], source="late")
    both.write([TEXT[:16], TEXT[:16]], source="late")
    with monkeypatch.context() as patch:
        patch.setattr(memory.engine, "write", At(memory.engine.write, 2))
        with pytest.raises(KeyboardInterrupt):
            memory.write([TEXT[:16], TEXT[:16]], source="late")
    tiny.assert_same(memory, first)
    memory.write([None, TEXT[:16]], source="late")
    tiny.assert_same(memory, both)


@pytest.mark.parametrize("name", ["paper", "published"])
def test_interrupted_before_any_line(name: str) -> None:
    start = tiny.written(name, [140])
    expected = stages(start)
    state: dict[str, Memory] = {}
    found = set()

    def prepare() -> None:
        state["memory"] = start.fork()

    def write() -> None:
        state["memory"].write(TEXT, source="late")

    for _ in interrupted_everywhere(prepare, write, "/mplus/", most=on_every_change(45, nightly=120)):
        memory = state["memory"]
        assert 0 <= memory.version <= CHUNKS
        found.add(memory.version)
        check_at(memory, expected, memory.version)
    assert found == {0, 1, 2, 3}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.nightly  # where a signal strikes differs from run to run, also inside other packages
def test_interrupted_by_real_signals() -> None:
    start = tiny.written("published", [140])
    expected = stages(start)
    state: dict[str, Memory] = {}
    found = set()

    def prepare() -> None:
        state["memory"] = start.fork()

    for _ in interrupted_by_signals(prepare, lambda: state["memory"].write(TEXT, source="late"), 60):
        memory = state["memory"]
        found.add(memory.version)
        check_at(memory, expected, memory.version)
    assert found, "some signals struck in time"


@pytest.mark.parametrize("change", ["forget", "reset"])
def test_forgetting_is_all_or_nothing(change: str) -> None:
    start = tiny.written("published", [140, 60])
    before, after = start.fork(), start.fork()
    work = {"forget": lambda memory: memory.forget("first"), "reset": lambda memory: memory.reset()}[change]
    work(after)
    contents = [tiny.content(before), tiny.content(after)]
    state: dict[str, Memory] = {}

    def prepare() -> None:
        state["memory"] = start.fork()

    found = set()
    for _ in interrupted_everywhere(
        prepare, lambda: work(state["memory"]), "/mplus/", most=on_every_change(45, nightly=90)
    ):
        memory = state["memory"]
        found.add(memory.version)
        tiny.assert_content(memory, contents[memory.version])
    assert found == {0, 1}


def test_any_failure_of_a_part_is_undone() -> None:
    class Failing(FifoEviction):
        def select(self, store: Any, layer: int, excess: int) -> Any:
            if layer == 2:
                raise RuntimeError("disk on fire")
            return super().select(store, layer, excess)

    memory = tiny.written("paper", [240, 240])
    before = tiny.content(memory)
    memory.streams.eviction = Failing()
    with pytest.raises(RuntimeError, match="disk on fire"):
        memory.write([TEXT, TEXT])
    tiny.assert_content(memory, before)
