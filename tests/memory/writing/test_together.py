"""Several memories written at once hold what each would have got alone."""

from __future__ import annotations

import errno
import pickle
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch

import mplus
from mplus.errors import (
    InputError,
    LiveMemoryError,
    MemoryFileError,
    MemoryMismatchError,
    NonFiniteError,
    WriteTogetherError,
)
from mplus.memory import WriteReport
from mplus.memory.writing.change import ChunkChange
from tests.memory import tiny
from tests.memory.disks.disks import Watched, open_memory

if TYPE_CHECKING:
    from pathlib import Path

    from mplus.memory import Memory

pytestmark = pytest.mark.two_computations


@pytest.fixture
def model() -> Any:
    return tiny.build()


@pytest.fixture
def passes(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Shapes of the ids of every write pass."""
    engine, seen = model.mplus_engine, []
    own = engine.write

    def listen(views: Any, ids: torch.Tensor, *rest: Any) -> Any:
        seen.append(tuple(ids.shape))
        return own(views, ids, *rest)

    monkeypatch.setattr(engine, "write", listen)
    return seen


def assert_same(one: Memory, other: Memory) -> None:
    """The same but for what adding numbers in another order does."""
    found, wanted = tiny.content(one), tiny.content(other)
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            torch.testing.assert_close(
                value, wanted[name], atol=tiny.rounding(), rtol=0, msg=lambda text, name=name: f"{name}: {text}"
            )
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, wanted[name]), name
        else:
            assert value == wanted[name], name


def test_each_memory_gets_what_it_would_have_got_alone(model: Any, passes: list[tuple[int, int]]) -> None:
    kinds = ("hidden", "projected", "both", "hidden")
    together, alone = (
        [model.new_memory(seed=seed, memory_rows=kind) for seed, kind in enumerate(kinds)] for _ in range(2)
    )
    texts = [tiny.ids(tokens, seed) for seed, tokens in enumerate((70, 64, 33, 16))]
    names = ["a", None, "c", "d"]
    reports = mplus.write_together(together, texts, names)
    shared = list(passes)
    passes.clear()
    for memory, text, name, report in zip(alone, texts, names, reports, strict=True):
        expected = memory.write(text, source=name)
        assert (report.tokens, report.chunks) == (expected.tokens, expected.chunks)
        assert report.dropped_rows == expected.dropped_rows
    for one, other in zip(together, alone, strict=True):
        assert_same(one, other)
    assert sum(rows for rows, _ in shared) == len(passes)
    assert len(shared) < len(passes), "passes are shared"


def test_streams_of_one_memory_and_of_others_share_passes(model: Any, passes: list[tuple[int, int]]) -> None:
    several, single = model.new_memory(2), model.new_memory(seed=7)
    mplus.write_together([several, single], [tiny.prompts(2, 16), tiny.ids(16, 9)])
    assert passes == [(3, 16)]
    assert [len(state.stm[0]) for memory in (several, single) for state in memory.states] == [tiny.K] * 3


def test_a_row_may_be_left_out(model: Any) -> None:
    several, single = model.new_memory(2), model.new_memory()
    reports = mplus.write_together([several, single], [[None, tiny.ids(16)], tiny.ids(20)])
    assert [report.tokens for report in reports] == [[0, 16], [20]]
    assert reports[0].seconds == reports[1].seconds > 0


@pytest.mark.parametrize(
    ("data", "sources", "message"),
    [
        (["one"], None, "one text, and one source if any, for each memory: got 2 memories, 1 texts and 2 sources"),
        ("ab", None, "got 2 memories, one text and 2 sources"),
        ([tiny.ids(16), tiny.ids(16)], ["a"], "got 2 memories, 2 texts and 1 sources"),
    ],
)
def test_lists_that_do_not_fit_change_no_memory(model: Any, data: Any, sources: Any, message: str) -> None:
    memories = [model.new_memory(), model.new_memory()]
    with pytest.raises(InputError, match=message):
        mplus.write_together(memories, data, sources)
    with pytest.raises(InputError, match="errors must be 'raise' or 'return', got 'ignore'"):
        mplus.write_together(memories, [tiny.ids(16)] * 2, errors="ignore")  # type: ignore[call-overload]
    with pytest.raises(InputError, match="got 0 memories"):
        mplus.write_together([], [])
    assert [memory.version for memory in memories] == [0, 0]


def closed(model: Any, path: Any) -> Memory:
    memory = mplus.Memory.open(path, model)
    memory.close()
    return memory


def read_only(model: Any, path: Any) -> Memory:
    mplus.Memory.open(path, model).close()
    return mplus.Memory.open(path, model, read_only=True)


class Full(Watched):
    """A disk that takes nothing more, once it is full."""

    full = False

    def before(self, call: int, what: str) -> None:
        if self.full and what in {"create", "write"}:
            raise OSError(errno.ENOSPC, "No space left on device")


def on_a_full_disk(model: Any, path: Any) -> Memory:
    disk = Full()
    memory = open_memory(path, model, files=disk)
    memory.write(tiny.ids(16))
    disk.full = True
    return memory


def plain(model: Any, path: Any) -> Memory:
    memory: Memory = model.new_memory()
    return memory


TEXT = tiny.ids(40, 3)
BAD: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "empty": (plain, tiny.ids(0), InputError, "nothing to write"),
    "outside the vocabulary": (plain, torch.tensor([5, 5, 5, 5, 999]), InputError, "must lie in the vocabulary"),
    "no tokenizer": (plain, "I like tea, and a cake.", InputError, "needs a tokenizer"),
    "no text": (plain, 3.5, InputError, "write takes text, ids, chat messages or a list"),
    "dtype": (lambda model, _: model.new_memory().to(dtype=torch.bfloat16), TEXT, MemoryMismatchError, "bfloat16"),
    "batch": (lambda model, _: model.new_memory(2), TEXT, InputError, "one text per batch row"),
    "closed": (closed, TEXT, LiveMemoryError, "closed"),
    "read only": (read_only, TEXT, LiveMemoryError, "read_only"),
    "full disk": (on_a_full_disk, TEXT, MemoryFileError, "No space left"),
    "another decoder": (lambda *_: tiny.variant("published").new_memory(), TEXT, MemoryMismatchError, "one decoder"),
    "no memory": (lambda *_: "memory", TEXT, InputError, "must be instances of mplus.Memory, got str"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_what_cannot_be_written_keeps_no_other_memory_from_it(case: Any, tmp_path: Path) -> None:
    make, data, kind, message = case
    model = tiny.variant("paper")
    good, bad = [model.new_memory(seed=seed) for seed in range(3)], make(model, tmp_path)
    before = tiny.content(bad) if isinstance(bad, mplus.Memory) else {}
    memories, texts = [good[0], bad, *good[1:]], [tiny.ids(60), data, tiny.ids(40, 1), tiny.ids(16, 2)]
    with pytest.raises(WriteTogetherError, match=r"1 of 4 memories failed.*\[1\] ") as raised:
        mplus.write_together(memories, texts, ["a", "b", "c", "d"])
    error = raised.value
    assert list(error.errors) == [1]
    assert isinstance(error.errors[1], kind)
    assert message in str(error.errors[1])
    assert error.exceptions == (error.errors[1],)
    assert [sum(report.tokens) for report in error.reports] == [60, 0, 40, 16]
    if before:
        tiny.assert_content(bad, before)
    for seed, (memory, text, name) in enumerate(zip(good, (texts[0], *texts[2:]), "acd", strict=True)):
        alone = model.new_memory(seed=seed)
        alone.write(text, source=name)
        assert_same(memory, alone)
    results = mplus.write_together(memories, texts, errors="return")
    assert [type(result) for result in results[::2]] == [WriteReport, WriteReport]
    assert isinstance(results[1], kind)
    assert [memory.states[0].clock for memory in good] == [2 * 4 * tiny.K, 2 * 3 * tiny.K, 2 * tiny.K]


def test_a_memory_that_comes_twice_is_written_once(model: Any) -> None:
    one, other = model.new_memory(), model.new_memory()
    with pytest.raises(WriteTogetherError) as raised:
        mplus.write_together([one, other, one], [tiny.ids(16), tiny.ids(16, 1), tiny.ids(16, 2)], ["a", "b", "c"])
    assert list(raised.value.errors) == [2]
    assert "comes at place 0 already" in str(raised.value.errors[2])
    assert [source.name for memory in (one, other) for source in memory.sources()] == ["a", "b"]
    with pytest.raises(WriteTogetherError) as raised:  # the first is refused, so that the second is the only one
        mplus.write_together([one, one], [tiny.ids(0), tiny.ids(16, 2)], ["a", "c"])
    assert list(raised.value.errors) == [0]
    assert [source.name for source in one.sources()] == ["a", "c"]


def test_alone_a_memory_raises_what_it_raised(model: Any) -> None:
    memory = model.new_memory()
    with pytest.raises(InputError, match="nothing to write"):
        memory.write(tiny.ids(0))
    with pytest.raises(WriteTogetherError) as raised:
        mplus.write_together([memory], [tiny.ids(0)])
    assert isinstance(raised.value.errors[0], InputError)
    caught = []
    try:
        mplus.write_together([memory], [tiny.ids(0)])
    except* InputError as group:
        caught = list(group.exceptions)
    assert len(caught) == 1
    again = pickle.loads(pickle.dumps(raised.value))
    assert (again.reports, list(again.errors)) == (raised.value.reports, [0])


def test_what_is_not_finite_for_one_is_written_for_the_others(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second chunk of one memory; all three share the pass."""
    memories, engine = [model.new_memory(seed=seed) for seed in range(3)], model.mplus_engine
    own, turns = engine.write, []

    def overflowing(views: Any, ids: Any, *rest: Any) -> Any:
        turns.append(len(views))
        made = own(views, ids, *rest)
        if len(turns) == 2:
            made.hidden[1][1, 0, 0] = torch.nan
        return made

    monkeypatch.setattr(engine, "write", overflowing)
    texts = [tiny.ids(48, seed) for seed in range(3)]
    with pytest.raises(WriteTogetherError) as raised:
        mplus.write_together(memories, texts)
    monkeypatch.undo()
    assert turns == [3, 3, 2]
    (error,) = raised.value.errors.values()
    assert isinstance(error, NonFiniteError)
    assert "NaN or Inf in layer 1 for a chunk of 16 tokens" in str(error)
    assert [report.tokens for report in raised.value.reports] == [[48], [16], [48]]
    for seed, tokens in enumerate((48, 16, 48)):
        alone = model.new_memory(seed=seed)
        alone.write(texts[seed][:tokens])
        assert_same(memories[seed], alone)


def test_numbers_that_are_not_finite_for_any_leave_all_alone(model: Any) -> None:
    memories = [model.new_memory(), model.new_memory()]
    with torch.no_grad():
        model.get_parameter("mplus.mark").fill_(torch.nan)
    with pytest.raises(WriteTogetherError, match="2 of 2 memories failed") as raised:
        mplus.write_together(memories, [tiny.ids(16), tiny.ids(16, 1)])
    assert {type(error) for error in raised.value.errors.values()} == {NonFiniteError}
    assert [memory.version for memory in memories] == [0, 0]


def test_a_pass_that_fails_is_divided(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is too large, or one of its texts is to blame."""
    engine, sizes = model.mplus_engine, []
    own, texts = engine.write, [tiny.ids(16, seed) for seed in range(5)]

    def failing(views: Any, ids: Any, *rest: Any) -> Any:
        sizes.append(len(ids))
        if len(ids) > 2 or any(torch.equal(row, texts[3]) for row in ids):
            raise RuntimeError("out of memory")
        return own(views, ids, *rest)

    monkeypatch.setattr(engine, "write", failing)
    memories = [model.new_memory() for _ in texts]
    results = mplus.write_together(memories, texts, errors="return")
    assert [isinstance(result, RuntimeError) for result in results] == [False, False, False, True, False]
    assert [memory.version for memory in memories] == [1, 1, 1, 0, 1]
    assert sizes == [5, 2, 3, 1, 2, 1, 1]


def test_an_interrupt_ends_it_at_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memories, taken = [model.new_memory() for _ in range(3)], []
    apply_write = ChunkChange.make

    def interrupted(*args: Any) -> None:
        if len(taken) == 4:
            raise KeyboardInterrupt
        taken.append(args)
        apply_write(*args)

    monkeypatch.setattr(ChunkChange, "make", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mplus.write_together(memories, [tiny.ids(48, seed) for seed in range(3)], errors="return")
    monkeypatch.undo()
    assert [memory.version for memory in memories] == [2, 1, 1]
    for seed, (memory, chunks) in enumerate(zip(memories, (2, 1, 1), strict=True)):
        alone = model.new_memory()
        alone.write(tiny.ids(48, seed)[: 16 * chunks])
        assert_same(memory, alone)
    assert mplus.write_together(memories, [tiny.ids(16)] * 3)[2].tokens == [16], "no lock is left held"


def test_two_calls_over_the_same_memories_do_not_wait_for_each_other_for_ever(model: Any) -> None:
    one, other = model.new_memory(), model.new_memory()
    threads = [
        threading.Thread(target=mplus.write_together, args=(order, [tiny.ids(64), tiny.ids(64, 1)]), daemon=True)
        for order in [[one, other], [other, one]] * 3
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert [memory.states[0].clock for memory in (one, other)] == [6 * 4 * tiny.K] * 2
