"""Several memories written at once hold what each would have got alone."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch

import mplus
from mplus.errors import InputError, MemoryMismatchError, NonFiniteError
from tests.memory import tiny

if TYPE_CHECKING:
    from mplus.memory import Memory


@pytest.fixture
def model() -> Any:
    return tiny.build()


@pytest.fixture
def passes(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Shapes of the ids of every write pass."""
    engine, seen = model.mplus_engine, []
    encode = engine.encode

    def listen(states: Any, ids: torch.Tensor) -> Any:
        seen.append(tuple(ids.shape))
        return encode(states, ids)

    monkeypatch.setattr(engine, "encode", listen)
    return seen


def assert_same(one: Memory, other: Memory) -> None:
    """The same but for what adding numbers in another order does."""
    found, wanted = tiny.content(one), tiny.content(other)
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            torch.testing.assert_close(
                value, wanted[name], atol=2e-5, rtol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
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
        ([tiny.ids(16), tiny.ids(16)], ["a"], "got 2 memories, 2 texts and 1 sources"),
        ([tiny.ids(16), tiny.ids(2)], None, "min_chunk_tokens"),
        ([tiny.ids(16), torch.tensor([5, 5, 5, 5, 999])], None, "ids must lie in the vocabulary"),
    ],
)
def test_what_cannot_be_written_changes_no_memory(model: Any, data: Any, sources: Any, message: str) -> None:
    memories = [model.new_memory(), model.new_memory()]
    with pytest.raises(InputError, match=message):
        mplus.write_together(memories, data, sources)
    assert [memory.version for memory in memories] == [0, 0]


def test_no_memory_twice_and_no_other_decoder(model: Any) -> None:
    memory, text = model.new_memory(), tiny.ids(16)
    with pytest.raises(InputError, match="memories must be different ones"):
        mplus.write_together([memory, memory], [text, text])
    with pytest.raises(InputError, match="got 0 memories"):
        mplus.write_together([], [])
    other = tiny.variant("paper").new_memory()
    with pytest.raises(MemoryMismatchError, match="must belong to one decoder"):
        mplus.write_together([memory, other], [text, text])


def test_numbers_that_are_not_finite_leave_all_memories_of_the_pass_alone(model: Any) -> None:
    memories = [model.new_memory(), model.new_memory()]
    with torch.no_grad():
        model.get_parameter("mplus.mark").fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="NaN or Inf in layer 0 for a chunk of 16 tokens"):
        mplus.write_together(memories, [tiny.ids(16), tiny.ids(16, 1)])
    assert [memory.version for memory in memories] == [0, 0]


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
