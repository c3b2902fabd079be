"""Eviction policies inside a memory: lifetimes, notes on reads, and what of it is saved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mplus
from mplus.errors import MechanismError
from mplus.eviction import FifoEviction
from mplus.memory.format.offline import forget_saved
from mplus.memory.recompute import refresh_if_stale
from mplus.stores.access_log import NEVER
from tests.memory import tiny
from tests.memory.counting import LAYERS, counting_memory, tiers

if TYPE_CHECKING:
    from pathlib import Path

    from mplus.memory import Memory

SIZES: dict[str, Any] = {"memory_tokens_per_chunk": 2, "short_term_tokens": 4, "retrieved_tokens": 1}
LIFETIME = {"lifetime": 3.0, "decay": 0.5}


@settings(max_examples=20)
@given(writes=st.lists(st.integers(1, 20), min_size=1, max_size=8), published=st.booleans())
def test_ttl_is_the_countdown_of_the_mechanism_as_a_policy(writes: list[int], published: bool) -> None:
    waiting = {"merge_every": 2} if published else {}
    sizes = {**SIZES, "long_term_tokens": None}
    one = counting_memory(**sizes, mechanism={"name": "mplus", **waiting, **LIFETIME})
    other = counting_memory(**sizes, mechanism={"name": "mplus", **waiting}, eviction={"name": "ttl", **LIFETIME})
    for tokens in writes:
        reports = [memory.write([7] * tokens).evicted_rows for memory in (one, other)]
        tiny.assert_same(one, other)
        assert reports[0] == reports[1]


def test_rows_expire_without_any_limit_on_their_number() -> None:
    memory = counting_memory(
        **SIZES, long_term_tokens=None, eviction={"name": "ttl", "lifetime": 3.0}, drop_per_layer=False
    )
    written = []
    for _ in range(30):
        memory.write([7] * 8)
        written.append(tiers(memory, 0)["ltm"])
    for turn in range(10, 30):
        assert len(written[turn]) == 4, "two rows come in with every write and live for two more"
        assert set(written[turn]) == set(written[turn]) - set(written[turn - 3])


def retrieved(memory: Memory, prompt: Any) -> list[set[int]]:
    """Births of the long-term rows that a read of the prompt brings back, by layer."""
    result = memory.engine.model.generate(  # type: ignore[attr-defined]
        prompt, memory=memory, max_new_tokens=1, return_dict_in_generate=True, output_sources=True
    )
    clock = memory.states[0].clock
    return [{clock - 1 - row.age for row in layer} for layer in result.memory_sources[0]]


def births(memory: Memory) -> list[set[int]]:
    store = memory.stores[0]
    return [set(store.gather(layer, store.ids(layer)).birth.tolist()) for layer in range(3)]


@pytest.fixture(scope="module")
def lru_model() -> Any:
    return tiny.build(eviction="lru", long_term_tokens=16)


def test_lru_keeps_what_is_read(lru_model: Any) -> None:
    """Against a plain list: rows retrieved since leave after those that were only written."""
    memory = lru_model.new_memory()
    memory.write(tiny.ids(16 * 7))
    content, version = tiny.content(memory), memory.version
    read = retrieved(memory, tiny.prompts(1))
    tiny.assert_content(memory, content)
    assert memory.version == version, "a read changes nothing"
    before = births(memory)
    for _ in range(3):
        memory.write(tiny.ids(16))
    for layer, (held, used, now) in enumerate(zip(before, read, births(memory), strict=True)):
        assert len(held) == len(now) == 16
        assert len(used) == tiny.K0
        unread = sorted(held - used)
        gone = held - now
        # Twelve rows came since. Those written after the read count as younger than it.
        assert not gone & used, layer
        assert gone >= set(unread[: len(gone)]) - now
        assert sorted(gone) == unread[: len(gone)]


def test_lru_notes_are_saved_loaded_forked_and_selected(lru_model: Any, tmp_path: Path) -> None:
    memory = lru_model.new_memory(batch_size=2)
    memory.write([tiny.ids(16 * 7), tiny.ids(16 * 9, 1)])
    lru_model(tiny.prompts(2), memory=memory)
    memory.save(tmp_path / "saved")
    copies = {
        "fork": memory.fork(),
        "load": mplus.Memory.load(tmp_path / "saved", lru_model),
        "select": memory.select([0, 1]),
        "to": memory.to(dtype=torch.float64).to(dtype=torch.float32),
    }
    more = [tiny.ids(16 * 2, 2), tiny.ids(16 * 2, 3)]
    unread = lru_model.new_memory(batch_size=2)
    unread.write([tiny.ids(16 * 7), tiny.ids(16 * 9, 1)])
    unread.write(more)
    lru_model(tiny.prompts(2, seed=7), memory=copies["fork"].fork())  # what a copy of a copy reads is noted there only
    memory.write(more)
    for name, copy in copies.items():
        copy.write(more)
        assert tiny.difference(tiny.content(copy), tiny.content(memory)) == [], name
    assert tiny.difference(tiny.content(memory), tiny.content(unread)) != [], "the read mattered"


def test_other_policies_take_no_notes_and_a_file_without_them_is_read(lru_model: Any, tmp_path: Path) -> None:
    memory = tiny.variant("paper").new_memory()
    memory.write(tiny.ids(16 * 7))
    tiny.variant("paper")(tiny.prompts(1), memory=memory)
    assert memory.snapshot()[0].access_log is None
    memory.save(tmp_path)
    again = mplus.Memory.load(tmp_path, tiny.variant("paper"), eviction="lru")
    access_log = again.snapshot()[0].access_log
    assert access_log is not None
    assert set(access_log.times(0, again.stores[0].ids(0)).tolist()) == {NEVER}


def test_notes_of_pending_rows_name_the_rows_in_the_store() -> None:
    """With pending rows a retriever counts places, not ids."""
    model = tiny.build(mechanism={"name": "mplus", "merge_every": 3}, eviction="lru", long_term_tokens=100)
    memory = model.new_memory()
    memory.write(tiny.ids(16 * 11))
    assert len(memory.states[0].pending[0])
    store, access_log = memory.stores[0], memory.snapshot()[0].access_log
    assert int(store.ids(0)[0]) == 0
    store.remove(0, store.ids(0)[:3])  # places and ids differ now
    read = retrieved(memory, tiny.prompts(1))
    assert access_log is not None
    stored = store.gather(0, store.ids(0)).birth
    noted = access_log.times(0, store.ids(0)) > NEVER
    assert set(stored[noted].tolist()) == read[0] & set(stored.tolist())
    assert noted.any()


def test_notes_move_with_rows_that_are_computed_anew() -> None:
    model = tiny.build(eviction="lru", long_term_tokens=16, memory_rows="both")
    memory = model.new_memory()
    memory.write(tiny.ids(16 * 7))
    model(tiny.prompts(1), memory=memory)
    access_log = memory.snapshot()[0].access_log
    assert access_log is not None
    before = [access_log.times(layer, memory.stores[0].ids(layer)) for layer in range(3)]
    with torch.no_grad():
        next(model.mplus.retriever.parameters()).mul_(1.5)
    ids = memory.stores[0].ids(0).tolist()
    refresh_if_stale(memory.streams)
    assert not set(ids) & set(memory.stores[0].ids(0).tolist())
    access_log = memory.snapshot()[0].access_log
    assert access_log is not None
    after = [access_log.times(layer, memory.stores[0].ids(layer)) for layer in range(3)]
    assert [times.tolist() for times in after] == [times.tolist() for times in before]
    assert any((times > NEVER).any() for times in after)


@pytest.mark.parametrize("name", ["paper", "published"])
def test_a_lifetime_begins_or_ends_when_a_memory_is_loaded(name: str, tmp_path: Path) -> None:
    memory = tiny.written(name, [16 * 9])
    memory.save(tmp_path)
    again = mplus.Memory.load(tmp_path, tiny.variant(name), eviction={"name": "ttl", "lifetime": 2.0})
    store = again.stores[0]
    rows = store.gather(0, store.ids(0))
    if name == "paper":
        assert rows.expiry is not None
        assert rows.expiry.tolist() == [2.0] * len(rows)
        again.write(tiny.ids(16 * 5))
        left = store.gather(0, store.ids(0))
        assert min(left.birth.tolist()) > max(rows.birth.tolist()[:3])
        again.save(tmp_path / "again")
        fifo = mplus.Memory.load(tmp_path / "again", tiny.variant(name), eviction="fifo")
        assert fifo.stores[0].gather(0, fifo.stores[0].ids(0)).expiry is None
        fifo.write(tiny.ids(16))
        forget_saved(tmp_path / "again", "first")
    else:
        old = memory.stores[0].gather(0, memory.stores[0].ids(0)).expiry
        assert old is not None
        assert rows.expiry is not None
        assert torch.equal(rows.expiry, old), "rows keep what they have"


def test_layers_of_a_memory_are_alike_for_all_policies() -> None:
    for eviction in ("fifo", "ttl", "lru", "reservoir"):
        memory = counting_memory(**SIZES, long_term_tokens=7, eviction=eviction, batch_size=2)
        for _ in range(12):
            memory.write([[7] * 9, [8] * 4])
        for row in (0, 1):
            assert all(memory.stores[row].count(layer) <= 7 for layer in range(LAYERS)), eviction


WRONG: dict[str, tuple[Any, str]] = {
    "no tensor": (lambda ids: None, "got NoneType"),
    "too few": (lambda ids: ids[:-1], r"got torch.int64 \[0\]|got torch.int64 \[1\]"),
    "rows twice": (lambda ids: ids[:1].expand(len(ids)), r"got torch.int64 \[2\] \[(\d+), \1\]"),
    "no ids": (lambda ids: ids.double(), r"got torch.float64 \[2\]"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_policy_that_chooses_other_rows_is_named_and_nothing_is_written(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, said = WRONG[what]
    memory = counting_memory(**SIZES, long_term_tokens=4)
    for _ in range(4):
        memory.write([7] * 8)
    before, own = tiers(memory, 0), FifoEviction.select
    monkeypatch.setattr(FifoEviction, "select", lambda *given: spoil(own(*given)))
    with pytest.raises(MechanismError, match=rf"^the eviction policy 'fifo': select must return ids \[2\] .*{said}"):
        memory.write([7] * 8)
    assert tiers(memory, 0) == before
