"""A write is refused before RAM or disk run out, by what the system says is free."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import mplus
from mplus.errors import MemoryFullError, WriteTogetherError
from mplus.memory.writing import free
from tests.memory import tiny

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.build(long_term_tokens=None)


def ids(tokens: int, seed: int = 0) -> torch.Tensor:
    return tiny.ids(tokens, seed)


def leave(monkeypatch: pytest.MonkeyPatch, what: str, margin: int, spare: int) -> None:
    """Let so many bytes be free besides the margin."""
    monkeypatch.setattr(free, what, lambda where: margin + spare)


def test_a_write_that_ram_has_no_room_for_is_refused_whole(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = model.new_memory(seed=1)
    memory.write(ids(64), "a")
    before = [state.clock for state in memory.states], memory.version
    row = memory.stores[0].bytes_per_row * memory.stores[0].layout.layers
    leave(monkeypatch, "free_memory", free.RAM_MARGIN, 200 * row)
    with pytest.raises(MemoryFullError, match=r"cpu memory must have .* to spare\), got .*nothing was written"):
        memory.write(ids(16 * 16 * 8, 1), "b")
    assert ([state.clock for state in memory.states], memory.version) == before
    memory.write(ids(64, 1), "b")  # a short one fits
    monkeypatch.setattr(free, "free_memory", lambda where: None)  # a system that does not tell
    memory.write(ids(64, 2), "c")


def test_a_directory_is_refused_before_its_disk_is_full(
    model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with mplus.Memory.open(tmp_path / "memory", model, seed=1) as memory:
        memory.write(ids(64), "a")
        before = memory.version
        leave(monkeypatch, "free_disk", free.DISK_MARGIN, 0)
        with pytest.raises(MemoryFullError, match=r"the disk of .*memory must have .*: make room there"):
            memory.write(ids(64, 1), "b")
        assert memory.version == before
        leave(monkeypatch, "free_disk", free.DISK_MARGIN, 10**8)
        memory.write(ids(64, 1), "b")


def test_rows_that_will_leave_need_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = tiny.build().new_memory(seed=1)
    memory.write(ids(640), "a")
    assert memory.stores[0].count(0) == memory.capacity
    leave(monkeypatch, "free_memory", free.RAM_MARGIN, 0)
    memory.write(ids(640, 1), "b")


def test_other_memories_are_written_all_the_same(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    full, empty = model.new_memory(seed=1), model.new_memory(seed=2)
    monkeypatch.setattr(free, "free_memory", lambda where: free.RAM_MARGIN + 20_000)
    with pytest.raises(WriteTogetherError) as raised:
        mplus.write_together([full, empty], [ids(16 * 500), ids(16, 1)])
    assert list(raised.value.errors) == [0]
    assert isinstance(raised.value.errors[0], MemoryFullError)
    assert empty.sources()


def test_what_the_system_tells_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free, "CGROUP", tmp_path)
    alone = free.free_memory(torch.device("cpu"))
    assert alone is None or alone > 0
    for name, value in (("memory.max", "1000"), ("memory.current", "900"), ("memory.stat", "anon 5\ninactive_file 50")):
        (tmp_path / name).write_text(value)
    assert free.free_memory(torch.device("cpu")) == 150
    (tmp_path / "memory.max").write_text("max")
    assert free.free_memory(torch.device("cpu")) != 150
    assert free.free_disk(tmp_path) > 0
