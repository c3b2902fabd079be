"""What another memory holds comes into one: all of it, in order, once, and durably."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import hypothesis.strategies as st
import pytest
import torch
from attrs import evolve
from hypothesis import given, settings

import mplus
from benchmarks.quality.architectures.decoders import BY_NAME
from mplus.errors import InputError, LiveMemoryError, MemoryFullError, MemoryMismatchError, NotSupported
from mplus.memory import Memory
from mplus.memory.format.verify import verify
from mplus.memory.merging import merge as merging
from mplus.rows import NO_SOURCE
from tests.helpers.clock import NOON, Hands
from tests.mechanisms.soft_prompt import SoftPromptMechanism
from tests.memory import tiny
from tests.memory.disks.plain import PlainModel, chunk, reopened

if TYPE_CHECKING:
    from pathlib import Path

UNLIMITED = PlainModel(long_term_tokens=None)
SMALL = PlainModel()
WAITING = PlainModel(
    long_term_tokens=None, retrieved_tokens=4, mechanism={"name": "mplus", "merge_every": 3, "ages": "release"}
)
LAPSING = PlainModel(eviction={"name": "ttl", "lifetime": 1e6}, long_term_tokens=None, retrieved_tokens=4)


def rows_of(memory: Memory, row: int = 0) -> Counter[tuple[Any, ...]]:
    """Layer, name of the source and content of every row that a stream holds."""
    state, store = memory.states[row], memory.stores[row]
    names = {NO_SOURCE: None, **{number: source.name for number, source in state.sources.items()}}
    found: Counter[tuple[Any, ...]] = Counter()
    for layer in range(store.layout.layers):
        tiers = [store.gather(layer, store.ids(layer)), *(parts[layer] for parts in state.row_lists().values())]
        for rows in tiers:
            for number, hidden in zip(rows.source.tolist(), rows.need_hidden(), strict=True):
                found[layer, names[number], tiny.raw(hidden)] += 1
    return found


def order_of(memory: Memory, layer: int = 0) -> list[bytes]:
    """The content of all rows of a layer, oldest birth first."""
    state, store = memory.states[0], memory.stores[0]
    tiers = [store.gather(layer, store.ids(layer)), *(parts[layer] for parts in state.row_lists().values())]
    rows = [pair for part in tiers for pair in zip(part.birth.tolist(), part.need_hidden(), strict=True)]
    assert len({birth for birth, _ in rows}) == len(rows), "one birth, one row"
    return [tiny.raw(hidden) for _, hidden in sorted(rows, key=lambda pair: pair[0])]


def names(memory: Memory) -> list[str | None]:
    return [source.name for source in memory.sources()]


def told(model: Any, texts: list[tuple[int, str | None]], clock: Hands | None = None, **options: Any) -> Memory:
    """A memory of these chunks, an hour apart."""
    hands = clock or Hands()
    memory: Memory = model.new_memory(clock=hands, **options)
    for number, name in texts:
        memory.write(chunk(number), source=name)
        hands.move(hours=1)
    return memory


class TestRows:
    @pytest.mark.parametrize("model", [UNLIMITED, WAITING, LAPSING], ids=["paper", "published", "ttl"])
    def test_below_capacity_nothing_is_lost(self, model: Any, tmp_path: Path) -> None:
        one = told(model, [(number, "abc"[number % 3]) for number in range(7)], seed=1)
        other = told(model, [(50 + number, "cd"[number % 2]) for number in range(6)], seed=2)
        before, expected = tiny.content(other), rows_of(one) + rows_of(other)
        report = one.merge(other)
        assert rows_of(one) == expected
        tiny.assert_content(other, before)
        assert report.sources == [{"c": "c", "d": "d"}]
        assert report.chunks == [6]
        assert report.evicted_rows == [0]
        one.save(tmp_path / "saved")
        assert verify(tmp_path / "saved") == []
        tiny.assert_same(Memory.load(tmp_path / "saved", model), one)
        one.write(chunk(80), source="later")

    def test_at_capacity_the_policy_lets_the_oldest_leave(self) -> None:
        clock = Hands()
        one, other = (told(SMALL, [(at + n, name) for n in range(7)], clock) for at, name in ((0, "old"), (50, "new")))
        expected = [*order_of(one), *order_of(other)]
        report = one.merge(other)
        held, capacity = one.stores[0].count(0), SMALL.mplus_engine.config.long_term_tokens
        assert held == capacity
        gone = [row for row in expected if row not in order_of(one)]
        assert report.evicted_rows == [len(gone)]
        in_stm = {tiny.raw(hidden) for hidden in one.states[0].row_lists()["stm"][0].need_hidden()}
        assert gone == [row for row in expected if row not in in_stm][: len(gone)]

    def test_memoryllm_keeps_a_random_share_of_both(self) -> None:
        model = tiny.variant("memoryllm")
        one, other = (model.new_memory(seed=seed) for seed in (1, 2))
        for turn in range(4):
            one.write(tiny.ids(16, turn), source="own")
            other.write(tiny.ids(16, 90 + turn), source="other")
        both = rows_of(one) + rows_of(other)
        report = one.merge(other)
        assert report.dropped_rows == [tiny.N]
        assert not rows_of(one) - both
        assert len(one.states[0].stm[0]) == tiny.N
        assert {name for _, name, _ in rows_of(one)} == {"own", "other"}

    @pytest.mark.parametrize("rows", ["projected", "both"])
    @pytest.mark.parametrize("name", ["paper", "memoryllm"])
    def test_what_the_next_write_reads_are_the_newest_rows_of_both(self, name: str, rows: Any) -> None:
        model, clock = tiny.variant(name), Hands()
        parts = [model.new_memory(seed=seed, memory_rows=rows, clock=clock) for seed in (1, 2)]
        full = [model.new_memory(seed=seed, memory_rows="both", clock=clock) for seed in (1, 2)]
        for memory, seed in zip((*parts, *full), (1, 2, 1, 2), strict=True):
            memory.write(tiny.ids(24, seed), source=f"{seed}")
        for memory, other in (parts, full):
            memory.merge(other)
        for layer in range(3):
            known = tiny.K if rows == "both" else len(parts[0].states[0].newest[layer])
            newest, mine = (memory[0].states[0].context(layer, known).need_hidden() for memory in (full, parts))
            assert torch.equal(newest, mine)
            assert 0 < known <= tiny.K
        parts[0].write(tiny.ids(16, 9))

    def test_what_was_retrieved_counts_for_lru_as_before(self) -> None:
        model = tiny.build(eviction="lru", long_term_tokens=None)
        clock = Hands()
        one, other = (model.new_memory(seed=seed, clock=clock) for seed in (1, 2))
        for memory in (one, other):
            memory.write(tiny.ids(96, id(memory) % 7), source="x")
            clock.move(hours=1)
            model(tiny.prompts(1), memory=memory)
        used = [
            int((memory.streams.access_logs[0].times(0, memory.stores[0].ids(0)) > 0).sum()) for memory in (one, other)
        ]
        one.merge(other)
        log, store = one.streams.access_logs[0], one.stores[0]
        assert min(used) > 0
        assert int((log.times(0, store.ids(0)) > 0).sum()) == sum(used)

    def test_rows_live_as_long_as_they_would_have(self) -> None:
        """Of a policy with lifetimes, what is left to each long-term row stays; rows without one get a whole one."""

        def left(memory: Memory) -> Counter[tuple[bytes, float]]:
            state, store = memory.states[0], memory.stores[0]
            rows, elapsed = store.gather(0, store.ids(0)), float(state.expiry_clock(store.layout.layers)[0])
            pairs = zip(rows.need_hidden(), rows.expiry.tolist(), strict=True)
            return Counter((tiny.raw(hidden), expiry - elapsed) for hidden, expiry in pairs)

        one, other = (told(LAPSING, [(at + n, "a") for n in range(count)]) for at, count in ((0, 5), (50, 7)))
        before = left(one) + left(other)
        one.merge(other)
        after = left(one)
        moved = dict(after.keys())
        assert all(expiry - moved[row] == 1.0 for row, expiry in before), "a merge lets one write's time pass"
        lasting = told(LAPSING, [(n, "a") for n in range(5)])
        lasting.merge(told(LAPSING, [(50 + n, "b") for n in range(7)], eviction="fifo"))
        assert max(expiry for _, expiry in left(lasting)) == 1e6 - 1

    def test_rows_of_a_checkpoint_are_there_once(self) -> None:
        pool = torch.randn(3, tiny.N, 32, generator=torch.Generator().manual_seed(0))
        decoder = BY_NAME["llama"].build(0)
        config = {**tiny.SIZES, "long_term_tokens": None, "adapters": None}
        model = mplus.wrap(decoder, config, check=False, pool=pool[..., : decoder.config.hidden_size])
        clock = Hands()
        one, other = (model.new_memory(seed=seed, memory_rows="both", clock=clock) for seed in (1, 2))
        for memory, seed in ((one, 1), (other, 2)):
            memory.write(tiny.ids(48, seed), source=f"{seed}")
        old = {row for row in rows_of(one) if row[1] is None}
        expected = sum(rows_of(one).values()) + sum(
            count for row, count in rows_of(other).items() if row[1] is not None
        )
        one.merge(other)
        found = rows_of(one)
        assert {row for row in found if row[1] is None} == old
        assert sum(found.values()) == expected

    def test_an_interrupt_leaves_all_as_it_was(self, monkeypatch: pytest.MonkeyPatch) -> None:
        one, other = told(SMALL, [(0, "a"), (1, "b")]), told(SMALL, [(2, "c")])
        before = tiny.content(one)

        def stop(*arguments: Any, **named: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(merging, "adopt_draft", stop)
            with pytest.raises(KeyboardInterrupt):
                one.merge(other)
        tiny.assert_content(one, before)
        one.merge(other)
        assert names(one) == ["a", "b", "c"]

    def test_every_batch_row_takes_in_its_own(self) -> None:
        texts = [[(0, "a"), (1, "b"), (2, "a")], [(50, "c"), (51, "a")]]
        one, other, both = (told(SMALL, [*part], seed=3) for part in (texts[0], texts[1], texts[0]))
        rows = one.select([0, 0])
        rows.merge(told(SMALL, texts[1], seed=3).select([0, 0]))
        both.merge(other)
        for row in range(2):
            tiny.assert_same(rows.fork(row), both)


class TestOrder:
    def test_by_time_of_writing(self) -> None:
        """Other was written between the two sources of one, and before the third."""
        clock = Hands()
        one = SMALL.new_memory(clock=clock)
        other = SMALL.new_memory(clock=clock)
        for memory, number, name in ((one, 0, "a"), (other, 1, "b"), (one, 2, "c"), (other, 3, "d"), (one, 4, "e")):
            memory.write(chunk(number), source=name)
            clock.move(minutes=1)
        a, b = order_of(one), order_of(other)
        one.merge(other)
        assert order_of(one) == [*a[:4], *b[:4], *a[4:8], *b[4:], *a[8:]]
        assert one.states[0].clock == 20
        assert [source.newest_age for source in one.sources()] == [16, 8, 0, 12, 4]

    def test_what_has_no_known_time_comes_last(self) -> None:
        one, other = told(SMALL, [(0, "a")]), told(SMALL, [(1, "b")], Hands(NOON - timedelta(days=1)))
        table = other.states[0].sources
        unknown = evolve(table[0], time=None, last_time=None)
        other.streams._states = (evolve(other.states[0], sources=table.having(0, unknown)),)
        a, b = order_of(one), order_of(other)
        one.merge(other)
        assert order_of(one) == [*a, *b]

    def test_what_has_left_counts_to_what_was_before_it(self) -> None:
        clock = Hands()
        one, other = told(SMALL, [(0, "a"), (1, "b"), (2, "c")], clock), told(SMALL, [(3, "d"), (4, "e")], clock)
        one.forget("b")
        other.forget("d")
        a, b = order_of(one), order_of(other)
        one.merge(other)
        assert order_of(one) == [*a, *b]
        assert one.states[0].clock == 20


class TestSources:
    def test_facts_come_along(self) -> None:
        clock = Hands()
        one, other = told(SMALL, [(0, "a")], clock), SMALL.new_memory(clock=clock)
        other.write(chunk(1), source="b", expires=timedelta(days=1), write_id="w1")
        other.write(chunk(2), source="gone")
        other.forget("gone", keep_name=True)
        other.pin("b")
        clock.move(hours=1)
        other.write(chunk(3), source="b")
        (expected,) = other.sources()
        one.merge(other)
        found = next(source for source in one.sources() if source.name == "b")
        facts = ("tokens", "chunks", "written", "last_written", "expires", "pinned")
        assert all(getattr(found, fact) == getattr(expected, fact) for fact in facts)
        assert one.forgotten() == ["gone"]
        before = tiny.content(one)
        assert one.write(chunk(1), source="b", write_id="w1").chunks == [1]
        tiny.assert_content(one, before)
        clock.move(days=2)
        assert [report.source for report in one.expire()] == ["b"]
        assert names(one) == ["a"]

    def test_one_name_twice(self) -> None:
        texts = [(0, "a"), (1, None), (2, "a (2)")]
        joined, renamed = told(SMALL, texts), told(SMALL, texts)
        other = told(SMALL, [(3, "a"), (4, None)], Hands(NOON + timedelta(days=1)))
        other.pin("a")
        joined.merge(other)
        assert [(s.name, s.chunks, s.pinned) for s in joined.sources()] == [
            ("a", 2, True), (None, 2, False), ("a (2)", 1, False),
        ]  # fmt: skip
        assert joined.sources()[0].last_written == NOON + timedelta(days=1)
        assert renamed.merge(other, sources="rename").sources == [{"a": "a (3)", None: None}]
        assert [(s.name, s.chunks) for s in renamed.sources()] == [("a", 1), (None, 2), ("a (2)", 1), ("a (3)", 1)]
        assert renamed.forget("a (3)").chunks == 1
        refusing = told(SMALL, texts)
        before = tiny.content(refusing)
        for _ in range(2):
            with pytest.raises(InputError, match=r"both memories have a source 'a', and sources='refuse'"):
                refusing.merge(other, sources="refuse")
        tiny.assert_content(refusing, before)

    def test_the_earlier_expiry_holds(self) -> None:
        one, other = SMALL.new_memory(clock=Hands()), SMALL.new_memory(clock=Hands())
        one.write(chunk(0), source="a", expires=timedelta(days=2))
        other.write(chunk(1), source="a", expires=timedelta(days=1))
        one.merge(other)
        assert one.sources()[0].expires == NOON + timedelta(days=1)

    def test_ids_of_writes_that_both_know_are_the_own_ones(self) -> None:
        one, other = told(SMALL, []), told(SMALL, [])
        one.write(chunk(0), source="a", write_id="1")
        other.write(chunk(5), source="b", write_id="1")
        with pytest.raises(InputError, match="both memories know the write_id '1'"):
            one.merge(other, sources="refuse")
        assert one.merge(other).unnoted_writes == [["1"]]
        assert one.write(chunk(0), source="a", write_id="1").chunks == [1]
        assert one.sources()[0].chunks == 1
        with pytest.raises(InputError, match="was given to another text"):
            one.write(chunk(5), source="b", write_id="1")

    def test_what_has_expired_there_does_not_come(self) -> None:
        clock, late = Hands(), Hands(NOON + timedelta(days=9))
        other = SMALL.new_memory(clock=clock)
        other.write(chunk(0), source="a", expires=timedelta(days=1))
        one = told(SMALL, [(1, "b")], late)
        one.merge(other)
        assert names(one) == ["b"]
        assert names(other) == ["a"]


class TestTexts:
    def test_rebuilding_writes_both(self) -> None:
        """A rebuilt memory is what it would be had all texts been written in their order."""
        model, clock = tiny.variant("paper"), Hands()
        one, other, both = (model.new_memory(seed=1, keep_text=True, clock=clock) for _ in range(3))
        for number, memory in enumerate((one, other, one, other)):
            for target in (memory, both):
                target.write(tiny.ids(40, number), source=f"s{number}")
            clock.move(minutes=1)
        one.merge(other)
        assert [text.ids.tolist() for text in one.states[0].texts.chunks()] == [
            text.ids.tolist() for text in both.states[0].texts.chunks()
        ]
        one.rewrite()
        assert rows_of(one) == rows_of(both)
        assert order_of(one) == order_of(both)

    def test_a_memory_that_keeps_texts_takes_none_without(self) -> None:
        one, other = told(SMALL, [(0, "a")], keep_text=True), told(SMALL, [(1, "b")])
        with pytest.raises(MemoryMismatchError, match="this memory keeps its texts and the other one does not"):
            one.merge(other)
        other.merge(one)
        assert names(other) == ["b", "a"]

    def test_what_waits_waits_with_what_waits(self) -> None:
        model = tiny.variant("paper")
        one, other, both = (model.new_memory(seed=1) for _ in range(3))
        for memory, seed, tokens, name in ((one, 1, 3, "a"), (other, 2, 2, "a"), (other, 3, 3, "b")):
            for target in (memory, both):
                target.write(tiny.ids(tokens, seed), source=name)
        before = tiny.content(other)
        one.merge(other)
        tiny.assert_content(other, before)
        assert [(part.ids.tolist(), part.source) for part in one.states[0].tail] == [
            (part.ids.tolist(), part.source) for part in both.states[0].tail
        ]
        assert [(s.name, s.tokens, s.tail_tokens) for s in one.sources()] == [("a", 5, 5), ("b", 3, 3)]
        many = model.new_memory(seed=1)
        for number in range(4):
            many.write(tiny.ids(3, number), source=f"m{number}")
        one.merge(many)
        assert sum(len(part.ids) for part in one.states[0].tail) <= tiny.CHUNK


class TestRefused:
    def test_what_does_not_fit(self) -> None:
        memory = told(SMALL, [(0, "a")])
        before = tiny.content(memory)
        cases: list[tuple[Any, type[Exception], str]] = [
            (memory, InputError, "cannot be merged into itself"),
            ("notes", InputError, "merge takes another mplus.Memory, got str"),
            (told(UNLIMITED, [(0, "a")]).select([0, 0]), MemoryMismatchError, "one batch size, got 1 and 2"),
            (told(SMALL, [(0, "a")]).to(torch.float64), MemoryMismatchError, "holds torch.float64"),
        ]
        for other, error, said in cases:
            with pytest.raises(error, match=said):
                memory.merge(other)
        with pytest.raises(InputError, match="sources must be 'join', 'rename' or 'refuse', got 'both'"):
            memory.merge(told(SMALL, []), sources="both")  # type: ignore[arg-type]
        tiny.assert_content(memory, before)

    def test_another_decoder(self) -> None:
        one, other = (tiny.build(seed).new_memory() for seed in (0, 1))
        with pytest.raises(MemoryMismatchError, match="must belong to one decoder, but base is"):
            one.merge(other)
        twin = tiny.build(0).new_memory()
        twin.write(tiny.ids(20), source="a")
        one.merge(twin)
        assert names(one) == ["a"], "an equal decoder is none other"

    def test_other_content(self) -> None:
        model = tiny.variant("paper")
        with pytest.raises(MemoryMismatchError, match="must keep the same of their rows"):
            model.new_memory(memory_rows="hidden").merge(model.new_memory(memory_rows="projected"))

    def test_pinned_sources_without_room(self) -> None:
        one, other = (told(SMALL, [(at + n, f"s{at}") for n in range(8)]) for at in (0, 50))
        one.pin("s0")
        other.pin("s50")
        before = tiny.content(one)
        with pytest.raises(MemoryFullError, match="not of pinned sources"):
            one.merge(other)
        tiny.assert_content(one, before)

    def test_a_mechanism_that_does_not_say_how(self) -> None:
        with pytest.raises(NotSupported, match="cannot be merged, since it does not say how"):
            SoftPromptMechanism.combine(SoftPromptMechanism.__new__(SoftPromptMechanism), None, None, None)  # type: ignore[arg-type]


class TestDirectories:
    @pytest.mark.parametrize("journal_bytes", [2**28, 1])
    def test_it_is_on_disk(self, tmp_path: Path, journal_bytes: int) -> None:
        clock = Hands()
        texts = [(number, "ab"[number % 2]) for number in range(8)]
        with Memory.open(tmp_path / "other", SMALL, clock=clock) as there:
            for number, name in texts:
                there.write(chunk(50 + number), source=name)
        before = {file.name: file.read_bytes() for file in (tmp_path / "other").iterdir()}
        clock.move(hours=1)
        memory = Memory.open(tmp_path / "live", SMALL, clock=clock, journal_bytes=journal_bytes)
        for number, name in texts:
            memory.write(chunk(number), source=name)
        clock.move(hours=1)
        other = reopened(tmp_path / "other", SMALL)
        memory.merge(other)
        with pytest.raises(LiveMemoryError, match="read_only=True"):
            other.merge(memory)
        tiny.assert_same(reopened(tmp_path / "live", SMALL), memory)
        memory.write(chunk(90), source="later")
        tiny.assert_same(reopened(tmp_path / "live", SMALL), memory)
        assert verify(tmp_path / "live") == []
        memory.close()
        assert verify(tmp_path / "live") == []
        assert {file.name: file.read_bytes() for file in (tmp_path / "other").iterdir()} == before


TEXTS = st.lists(st.tuples(st.integers(0, 90), st.sampled_from(["a", "b", None]), st.integers(0, 3)), max_size=7)


@settings(max_examples=40, deadline=None)
@given(one=TEXTS, other=TEXTS, forgotten=st.booleans(), rule=st.sampled_from(["join", "rename"]), waits=st.booleans())
def test_whatever_was_written(one: Any, other: Any, forgotten: bool, rule: Any, waits: bool) -> None:
    """Below capacity nothing is lost or doubled, sources add up, each memory's rows stay in order."""
    model, memories = WAITING if waits else UNLIMITED, []
    for seed, texts in enumerate((one, other)):
        clock = Hands(NOON + timedelta(minutes=seed))
        memory = model.new_memory(clock=clock, seed=seed, keep_text=True)
        for number, name, hours in texts:
            memory.write(chunk(number + 1 + seed), source=name, write_id=f"{seed}.{memory.version}")
            clock.move(hours=hours)
        if forgotten and texts:
            memory.forget(texts[0][1])
        memories.append(memory)
    mine, theirs = memories
    before = tiny.content(theirs)
    expected = sum(rows_of(mine).values()) + sum(rows_of(theirs).values())
    tokens = [sum(source.tokens for source in memory.sources()) for memory in memories]
    orders = [] if waits else [order_of(memory) for memory in memories]
    kept = [len(memory.states[0].texts) for memory in memories]
    writes = [len(memory.states[0].writes) for memory in memories]
    report = mine.merge(theirs, sources=rule)
    tiny.assert_content(theirs, before)
    assert sum(rows_of(mine).values()) == expected
    assert sum(source.tokens for source in mine.sources()) == sum(tokens)
    assert set(report.sources[0].values()) <= set(names(mine))
    assert len(mine.states[0].texts) == sum(kept)
    assert len(mine.states[0].writes) == sum(writes)
    for order in orders:
        merged = iter(order_of(mine))
        assert all(row in merged for row in order), "a part of the merged order"
