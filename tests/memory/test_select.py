"""``Memory.select``: rows of a memory, in any order and any number of times, as a memory of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import mplus
from mplus.errors import InputError
from mplus.memory.format.verify import verify
from tests.memory import tiny

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.two_computations

LENGTHS = [150, 40, 260]
ROWS = [2, 0, 2, 2, 1]


@pytest.fixture(scope="module", params=["paper", "published", "memoryllm"])
def memory(request: Any) -> mplus.Memory:
    return tiny.written(request.param, LENGTHS)


def read(memory: mplus.Memory, text: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = memory.engine.model(text, memory=memory).logits  # type: ignore[attr-defined]
    return logits


def test_reads_equal_those_of_each_row_alone(memory: mplus.Memory) -> None:
    text = tiny.prompts(len(ROWS))
    together = read(memory.select(ROWS), text)
    for place, row in enumerate(ROWS):
        alone = read(memory.select([row]), text[place : place + 1])
        torch.testing.assert_close(together[place : place + 1], alone, atol=tiny.rounding(), rtol=0)
    inside = read(memory, tiny.prompts(3))
    torch.testing.assert_close(read(memory.select(range(3)), tiny.prompts(3)), inside, atol=0, rtol=0)


def test_generates_and_names_sources_as_each_row_alone() -> None:
    memory = tiny.written("paper", LENGTHS)
    text, options = tiny.prompts(len(ROWS)), {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_sources": True}
    generate = memory.engine.model.generate  # type: ignore[attr-defined]
    together = generate(text, memory=memory.select(ROWS), **options)
    for place, row in enumerate(ROWS):
        alone = generate(text[place : place + 1], memory=memory.select([row]), **options)
        assert together.sequences[place].tolist() == alone.sequences[0].tolist()
        for layer, found in enumerate(together.memory_sources[place]):
            assert [one.age for one in found] == [one.age for one in alone.memory_sources[0][layer]]


def test_copies_share_everything_until_they_are_written(memory: mplus.Memory) -> None:
    copies = memory.select([2] * 50)
    assert copies.nbytes == memory.select([2]).nbytes
    first = copies.snapshot()
    assert len({id(view.store) for view in first}) == 1
    assert len({id(store) for store in copies.fork().stores}) == 1
    copies.write([None, tiny.ids(20, 5)] + [None] * 48, source="other")
    assert len({id(store) for store in copies.stores}) == 50


def test_a_store_of_several_rows_is_searched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With rows that wait for their merge, too."""
    for name in ("paper", "published"):
        memory = tiny.written(name, LENGTHS)
        retriever, seen = memory.engine.model.mplus.retriever, []  # type: ignore[attr-defined]
        found = type(retriever).select

        def select(self: Any, layer: int, queries: Any, mask: Any, stores: Any, k: int) -> Any:
            seen.append(len({id(store) for store in stores}))  # noqa: B023
            return found(self, layer, queries, mask, stores, k)  # noqa: B023

        monkeypatch.setattr(type(retriever), "select", select)
        read(memory.select([2, 0, 2, 2]), tiny.prompts(4))
        monkeypatch.undo()
        assert seen == [2] * 3, name


def test_each_copy_has_a_life_of_its_own_and_the_future_of_its_row(memory: mplus.Memory) -> None:
    before = tiny.content(memory)
    copies, twins = memory.select([2, 0, 2]), [memory.select([row]) for row in (2, 0, 2)]
    texts = [tiny.ids(90, 7), tiny.ids(60, 8), tiny.ids(30, 9)]
    copies.write(texts, source="new")
    copies.forget("first", row=2)
    for twin, text in zip(twins, texts, strict=True):
        twin.write(text, source="new")
    twins[2].forget("first")
    for row, twin in enumerate(twins):
        assert places(copies.select([row])) == places(twin)
    tiny.assert_content(memory, before)
    again = memory.select([0, 0])
    memory.fork().write([tiny.ids(30)] * 3)
    again.reset()
    assert [len(state.stm[0]) for state in again.states] == [0, 0]
    tiny.assert_content(memory, before)


def places(memory: mplus.Memory) -> dict[str, Any]:
    """Where every row is, without hidden states and keys: those of a batch differ from those of a row by rounding."""
    content = tiny.content(memory)
    return {
        name: part.tolist() if isinstance(part, torch.Tensor) else part
        for name, part in content.items()
        if not name.endswith((".hidden", ".key"))
    }


def test_a_refused_write_leaves_copies_as_they_were(memory: mplus.Memory) -> None:
    copies = memory.select([1, 1])
    before = tiny.content(copies)
    with pytest.raises(InputError, match="nobody wrote this"):
        copies.forget("nobody wrote this")
    tiny.assert_content(copies, before)


def test_copies_are_saved_and_loaded(memory: mplus.Memory, tmp_path: Path) -> None:
    copies = memory.select([2, 0, 2])
    copies.save(tmp_path)
    assert verify(tmp_path) == []
    again = mplus.Memory.load(tmp_path, memory.engine.model)  # type: ignore[attr-defined]
    tiny.assert_same(again, copies)
    assert again.stores[0] is again.stores[2]


@pytest.mark.parametrize(
    ("rows", "chosen"),
    [
        (torch.tensor([2, 0, 2]), [2, 0, 2]),
        (torch.tensor([1, 1], dtype=torch.int32), [1, 1]),
        (np.array([2, 1]), [2, 1]),
        ([np.int64(1), torch.tensor(2)], [1, 2]),
        (torch.tensor([True, False, True]), [0, 2]),
        (np.array([False, True, False]), [1]),
        ([False, True, True], [1, 2]),
        ((0,), [0]),
    ],
    ids=str,
)
def test_rows_are_numbers_or_a_mask(memory: mplus.Memory, rows: Any, chosen: list[int]) -> None:
    tiny.assert_same(memory.select(rows), memory.select(chosen))


def test_a_fork_of_one_row(memory: mplus.Memory) -> None:
    tiny.assert_same(memory.fork(1), memory.select([1]))
    for row in (3, -1, True, 1.0):
        with pytest.raises(InputError, match="row must be a batch row, 0 to 2, got"):
            memory.fork(row)  # type: ignore[arg-type]


WRONG = [[], range(0), 0, "0", b"0", None, slice(0, 2), torch.tensor(0), torch.tensor([]), torch.tensor([[0]])]


@pytest.mark.parametrize("rows", WRONG, ids=str)
def test_rows_must_be_a_list(memory: mplus.Memory, rows: Any) -> None:
    with pytest.raises(InputError, match="rows must be a list of one batch row or more, got"):
        memory.select(rows)


@pytest.mark.parametrize("row", [3, -1, True, 0.0, "0", None, torch.tensor(True), torch.tensor(0.0), torch.tensor([0])])
def test_rows_must_be_there(memory: mplus.Memory, row: Any) -> None:
    with pytest.raises(InputError, match="row must be a batch row, 0 to 2, got"):
        memory.select([0, row])


@pytest.mark.parametrize("mask", [[True, False], torch.zeros(3, dtype=torch.bool), torch.ones(4, dtype=torch.bool)])
def test_a_mask_must_choose_among_all_rows(memory: mplus.Memory, mask: Any) -> None:
    with pytest.raises(InputError, match="rows as a mask must have one bool for each of 3 batch rows"):
        memory.select(mask)


@pytest.mark.parametrize(
    ("arguments", "device", "dtype"),
    [
        ((torch.bfloat16,), "cpu", torch.bfloat16),
        (("cpu", torch.float16), "cpu", torch.float16),
        ((torch.zeros(1, dtype=torch.float64),), "cpu", torch.float64),
        ((torch.zeros(1), torch.float16), "cpu", torch.float16),
        ((torch.device("cpu"),), "cpu", torch.float32),
        ((), "cpu", torch.float32),
    ],
    ids=str,
)
def test_to_takes_what_a_tensor_takes(memory: mplus.Memory, arguments: Any, device: str, dtype: torch.dtype) -> None:
    moved = memory.to(*arguments)
    assert (moved.device.type, moved.dtype) == (device, dtype)
    assert moved.states[0].stm[0].to(dtype=dtype).birth.tolist() == memory.states[0].stm[0].birth.tolist()
    for name, part in tiny.content(moved).items():
        if name.endswith((".hidden", ".key")):
            assert part.dtype == dtype
            assert torch.equal(part, tiny.content(memory)[name].to(dtype))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.int8,), "dtype must be a floating torch.dtype, got torch.int8"),
        ((None, torch.bool), "dtype must be a floating torch.dtype, got torch.bool"),
        ((None, "float16"), "dtype must be a floating torch.dtype, got 'float16'"),
        ((torch.float16, torch.float32), "to takes one dtype"),
        (("meta",), "rows cannot be kept on the meta device"),
    ],
    ids=str,
)
def test_to_refuses_what_holds_no_rows(memory: mplus.Memory, arguments: Any, message: str) -> None:
    before = tiny.content(memory)
    with pytest.raises(InputError, match=message):
        memory.to(*arguments)
    tiny.assert_content(memory, before)
