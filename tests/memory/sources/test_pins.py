"""Rows of pinned sources stay, whatever the policy says; what has no room is refused before anything changes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mplus.config import Component
from mplus.errors import InputError, MemoryFullError, NotSupported
from mplus.eviction import EVICTION
from mplus.eviction.unpinned import UnpinnedRows
from mplus.memory import Memory
from mplus.memory.writing.write import write_together
from mplus.rows import MemoryRows
from mplus.stores import STORES
from mplus.stores.base import StoreLayout
from tests.helpers.clock import noon
from tests.memory.disks.plain import PlainModel, chunk
from tests.memory.tiny import assert_content, assert_same, content

if TYPE_CHECKING:
    from pathlib import Path

MODEL = PlainModel(retrieved_tokens=4)
POLICIES = ["fifo", "lru", "reservoir", {"name": "ttl", "lifetime": 3}]


def held(memory: Memory, name: str) -> list[int]:
    """Long-term rows of a source, in each layer."""
    number = memory.states[0].sources.find(name)
    store = memory.stores[0]
    return [int((store.column(layer, "source") == number).sum()) for layer in range(store.layout.layers)]


def write(memory: Memory, numbers: range, source: str) -> None:
    for number in numbers:
        memory.write(chunk(number), source=source)


@pytest.mark.parametrize("policy", POLICIES)
def test_whatever_is_written_they_stay(policy: object) -> None:
    memory = MODEL.new_memory(eviction=policy)
    write(memory, range(3), "keep")
    memory.pin("keep")
    write(memory, range(3, 6), "other")
    kept = held(memory, "keep")
    assert min(kept) > 0
    write(memory, range(6, 30), "other")
    assert all(now >= before for now, before in zip(held(memory, "keep"), kept, strict=True))
    assert memory.stores[0].count(0) <= memory.capacity
    memory.unpin("keep")
    write(memory, range(30, 60), "other")
    assert held(memory, "keep") != kept


def test_a_memory_full_of_them_takes_nothing_more(tmp_path: Path) -> None:
    with Memory.open(tmp_path / "live", MODEL, clock=noon) as memory:
        write(memory, range(12), "keep")
        assert memory.stores[0].count(0) == memory.capacity
        memory.pin("keep")
        before = content(memory)
        for write_it in (
            lambda: memory.write(torch.cat([chunk(1), chunk(2)]), source="other"),
            lambda: memory.write(chunk(1), source="keep"),
            lambda: memory.write(chunk(1), atomic=True),
            lambda: memory.write_chunk(chunk(1)[None]),
            lambda: memory.replace("other", chunk(1)),
        ):
            with pytest.raises(MemoryFullError, match=r"24 of the 24 long-term rows .* unpin or forget a source"):
                write_it()
            assert_content(memory, before)
        assert_same(Memory.open(tmp_path / "live", MODEL, read_only=True), memory)
        other = MODEL.new_memory()
        found = write_together([memory, other], [chunk(1), chunk(1)], errors="return")
        assert isinstance(found[0], MemoryFullError)
        assert found[1].chunks == [1]
        memory.replace("keep", chunk(1))
        assert [source.pinned for source in memory.sources()] == [True], "the new text is as the old one was"
        write(memory, range(3), "other")


def test_pins_are_kept_on_disk_and_in_copies(tmp_path: Path) -> None:
    with Memory.open(tmp_path / "live", MODEL, batch_size=2, clock=noon) as memory:
        memory.write([chunk(0), chunk(1)], source="a")
        memory.write([chunk(2), chunk(3)], source="b")
        memory.pin("a")
        memory.pin("b", row=1)
        memory.unpin("a", row=1)
        expected = [[True, False], [False, True]]
        assert_same(Memory.open(tmp_path / "live", MODEL, read_only=True), memory)
        memory.save(tmp_path / "saved")
    for copy in (memory.fork(), Memory.open(tmp_path / "live", MODEL), Memory.load(tmp_path / "saved", MODEL)):
        assert [[source.pinned for source in copy.sources(row)] for row in range(2)] == expected
        with pytest.raises(InputError, match="source must be one of this memory's sources"):
            copy.pin("c")


@pytest.mark.parametrize("config", [{"mechanism": "memoryllm"}, {"long_term_tokens": 0}])
def test_rows_that_leave_at_random_cannot_be_pinned(config: dict) -> None:
    memory = PlainModel(**config).new_memory()
    memory.write(chunk(0), source="a")
    with pytest.raises(NotSupported, match="none can be pinned"):
        memory.pin("a")


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.sets(st.integers(0, 3)), st.data())
def test_a_policy_chooses_among_the_others_as_if_they_were_alone(sources, pinned, data) -> None:
    layout = StoreLayout(layers=1, hidden_size=2, expiry=True)
    births, number = torch.arange(len(sources)), torch.tensor(sources)
    expiry = torch.tensor(data.draw(st.lists(st.floats(0, 9), min_size=len(sources), max_size=len(sources)))).double()
    rows = MemoryRows(torch.zeros(len(sources), 2), births, number, expiry=expiry)
    free = [place for place, source in enumerate(sources) if source not in pinned]
    if not free:
        return
    excess = data.draw(st.integers(1, len(free)))
    for policy in POLICIES:
        store, alone = (STORES.build(Component("ram"), layout) for _ in range(2))
        store.append(0, rows)
        alone.append(0, rows.select(torch.tensor(free)))
        chosen = EVICTION.build(Component.of(policy)).select(
            UnpinnedRows(store, torch.tensor(sorted(pinned))), 0, excess
        )
        expected = EVICTION.build(Component.of(policy)).select(alone, 0, excess)
        assert chosen.tolist() == [free[place] for place in expected.tolist()]
