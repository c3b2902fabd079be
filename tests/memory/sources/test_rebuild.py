"""Forgetting: what is reported, and rebuilding from kept texts as if a source had never been written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st

import mplus
from mplus.errors import InputError, NonFiniteError
from mplus.memory import ForgetReport
from mplus.memory.format.offline import forget_saved, saved_sources
from mplus.memory.format.verify import verify
from mplus.memory.texts import Text, Texts
from tests.memory import tiny
from tests.memory.counting import LAYERS, counting_memory

if TYPE_CHECKING:
    from pathlib import Path

    from mplus.memory import Memory

Write = tuple[tuple[int, ...], tuple[str | None, ...]]
"""Tokens and source of each stream; no tokens: nothing."""


def write(memory: Memory, what: Write, seed: int) -> None:
    lengths, names = what
    texts = [tiny.ids(length, seed + row) if length else None for row, length in enumerate(lengths)]
    memory.write(texts, source=list(names))


def without(writes: list[Write], name: str | None, rows: tuple[int, ...] = (0, 1)) -> list[tuple[int, Write]]:
    """The writes, numbered, with a source left out of some streams; those that are empty then are left out."""
    found = []
    for number, (lengths, names) in enumerate(writes):
        kept = tuple(0 if names[i] == name and i in rows else length for i, length in enumerate(lengths))
        if any(kept):
            found.append((number, (kept, names)))
    return found


WRITES: list[Write] = [
    ((40, 25), ("a", "b")),
    ((16, 70), ("b", "b")),
    ((90, 33), ("c", "a")),
    ((0, 20), (None, None)),
    ((30, 30), ("a", "c")),
]
MODELS = {**tiny.VARIANTS, "lru": {"eviction": "lru"}, "projected": {"memory_rows": "projected"}}


@pytest.mark.parametrize("name", MODELS)
def test_a_rebuilt_memory_is_one_written_without_the_source(name: str) -> None:
    model = tiny.variant(name) if name in tiny.VARIANTS else tiny.build(**MODELS[name])
    memory, other = (model.new_memory(batch_size=2, seed=5, keep_text=kept) for kept in (True, False))
    for number, what in enumerate(WRITES):
        write(memory, what, 10 * number)
    for number, what in without(WRITES, "a"):
        write(other, what, 10 * number)
    version = memory.version
    report = memory.forget("a", mode="rebuild")
    tiny.assert_same(memory, other)
    assert [entry.name for entry in memory.states[0].sources] == ["b", "c"], "not even the name is left"
    assert memory.version == version + 1
    assert (report.source, report.tokens, report.chunks) == ("a", 103, 3 + 3 + 2)
    assert report.rebuilt == sum(source.chunks for row in (0, 1) for source in memory.sources(row))
    write(memory, ((20, 20), ("d", "d")), 77)
    write(other, ((20, 20), ("d", "d")), 77)
    tiny.assert_same(memory, other)


def test_one_stream_can_be_rebuilt_without_a_source_that_another_keeps() -> None:
    model = tiny.variant("paper")
    memory, other = (model.new_memory(batch_size=2, keep_text=kept) for kept in (True, False))
    for number, what in enumerate(WRITES):
        write(memory, what, 10 * number)
    for number, what in without(WRITES, "a", (1,)):
        write(other, what, 10 * number)
    memory.forget("a", row=1, mode="rebuild")
    tiny.assert_same(memory, other)
    assert "a" in {source.name for source in memory.sources(0)}
    assert "a" not in {source.name for source in memory.sources(1)}


def test_texts_are_saved_loaded_forked_and_forgotten_with_their_source(tmp_path: Path) -> None:
    model = tiny.variant("paper")
    memory, expected = (model.new_memory(batch_size=2, seed=3, keep_text=kept) for kept in (True, False))
    for number, what in enumerate(WRITES):
        write(memory, what, 10 * number)
    memory.forget("b")  # its texts are gone: a memory without "a" is one without both
    memory.save(tmp_path / "saved")
    assert verify(tmp_path / "saved") == []
    for number, what in [(n, w) for n, w in without(WRITES, "a")]:
        for _, kept in without([what], "b"):
            write(expected, kept, 10 * number)
    loaded = mplus.Memory.load(tmp_path / "saved", model)
    assert loaded.streams.keeps_text
    fork = loaded.fork()
    write(fork, ((40, 40), ("late", "late")), 500)
    write(loaded, ((20, 0), ("other", "other")), 600)  # two futures of the same texts
    fork.forget("late", mode="rebuild")
    loaded.forget("other", mode="rebuild")
    for one in (memory, loaded, fork, fork.to(dtype=torch.float64).to(dtype=torch.float32)):
        one.forget("a", mode="rebuild")
        tiny.assert_same(one, expected)


def test_reset_begins_the_texts_anew() -> None:
    memory = counting_memory(memory_tokens_per_chunk=2, short_term_tokens=4, keep_text=True)
    memory.write([7] * 60, "a")
    memory.reset()
    fresh = memory.fork()
    memory.write([7] * 30, "b")
    memory.write([7] * 30, "c")
    fresh.engine.made.clear()
    fresh.write([7] * 30, "c")
    memory.engine.made.clear()
    memory.forget("b", mode="rebuild")
    tiny.assert_same(memory, fresh)


def test_what_is_refused_changes_nothing() -> None:
    plain = tiny.written("paper", [60])
    before = tiny.content(plain)
    with pytest.raises(InputError, match=r"needs the texts .* new_memory\(keep_text=True\), or use mode='drop'"):
        plain.forget("first", mode="rebuild")
    with pytest.raises(InputError, match="mode must be 'drop' or 'rebuild', got 'anew'"):
        plain.forget("first", mode="anew")  # type: ignore[arg-type]
    tiny.assert_content(plain, before)
    kept = tiny.variant("paper").new_memory(keep_text=True)
    kept.write(tiny.ids(60), "a")
    with pytest.raises(InputError, match=r"\('a'\), got 'b'"):
        kept.forget("b", mode="rebuild")
    with pytest.raises(mplus.errors.ConfigError, match="keep_text must be True or False, got 1"):
        tiny.variant("paper").new_memory(keep_text=1)


def test_rebuilding_is_all_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.variant("paper")
    memory = model.new_memory(keep_text=True)
    for number, name in enumerate("abc"):
        memory.write(tiny.ids(50, number), name)
    before, version = tiny.content(memory), memory.version
    own, calls = type(model.mplus_engine).write, []

    def write(self: Any, views: Any, ids: Any, *rest: Any) -> Any:
        calls.append(ids)
        made = own(self, views, ids, *rest)
        if len(calls) == 4:
            made = evolve(made, hidden=tuple(rows * float("nan") for rows in made.hidden))
        return made

    monkeypatch.setattr(type(model.mplus_engine), "write", write)
    with pytest.raises(NonFiniteError):
        memory.forget("a", mode="rebuild")
    tiny.assert_content(memory, before)
    assert memory.version == version
    assert len(calls) == 4
    assert memory.forget("a", mode="rebuild").rebuilt == 8
    assert memory.version == version + 1


def test_a_reader_keeps_what_it_saw() -> None:
    memory = tiny.variant("paper").new_memory(keep_text=True)
    for number, name in enumerate("ab"):
        memory.write(tiny.ids(150, number), name)
    view = memory.snapshot()[0]
    before = [view.store.gather(layer, view.store.ids(layer)) for layer in range(3)]
    memory.forget("a", mode="rebuild")
    for layer, rows in enumerate(before):
        now = view.store.gather(layer, view.store.ids(layer))
        for column, values in rows.columns().items():
            assert torch.equal(now.columns()[column], values)


# ---------------------------------------------------------------------- reports and lists


@pytest.mark.parametrize("mode", ["drop", "rebuild"])
def test_the_report_says_what_was_held(mode: Any) -> None:
    memory = counting_memory(
        memory_tokens_per_chunk=3,
        short_term_tokens=7,
        mechanism={"name": "mplus", "merge_every": 5},
        batch_size=2,
        keep_text=True,
    )
    for name in ("a", "b", "a"):
        memory.write([[7] * 30, [7] * 20], name)
    expected: list[list[int]] = [[], [], []]
    for layer in range(LAYERS):
        counts = [0, 0, 0]
        for state, store in zip(memory.states, memory.stores, strict=True):
            tiers = (state.stm[layer], state.pending[layer], store.gather(layer, store.ids(layer)))
            for place, rows in enumerate(tiers):
                counts[place] += rows.source.tolist().count(0)
        for place in range(3):
            expected[place].append(counts[place])
    assert all(map(any, expected)), "rows of the source are everywhere"
    named = dict(zip(("short-term", "pending", "long-term"), map(tuple, expected), strict=True))
    report = memory.forget("a", mode=mode)
    rebuilt = 4 + 3 if mode == "rebuild" else None
    assert report == ForgetReport("a", 100, 14, named, rebuilt)
    assert report.rows == sum(map(sum, expected))


def test_sources_have_ages_from_their_newest_to_their_oldest_row() -> None:
    memory = counting_memory(memory_tokens_per_chunk=2, short_term_tokens=4, long_term_tokens=6)
    for name in ("a", "b", "c", "a"):
        memory.write([7] * 16, name)
    memory.write([7] * 80, "d")
    ages = {source.name: (source.newest_age, source.oldest_age) for source in memory.sources()}
    chunks = {source.name: (source.newest_age_chunks, source.oldest_age_chunks) for source in memory.sources()}
    assert ages["a"] == ages["b"] == ages["c"] == (None, None), "ten rows are held, and d wrote twenty"
    found = [
        memory.states[0].clock - 1 - birth
        for layer in range(LAYERS)
        for rows in (memory.states[0].stm[layer], memory.stores[0].gather(layer, memory.stores[0].ids(layer)))
        for birth in rows.birth.tolist()
    ]
    assert ages["d"] == (0, max(found))
    assert chunks["d"] == (0, max(found) // 2)
    assert chunks["a"] == (None, None)


@pytest.mark.parametrize("name", ["paper", "published"])
@pytest.mark.parametrize("row", [None, 1])
def test_a_saved_memory_forgets_as_a_living_one(name: str, row: int | None, tmp_path: Path) -> None:
    model = tiny.variant(name)
    memory = model.new_memory(batch_size=2, keep_text=True)
    for number, what in enumerate(WRITES):
        write(memory, what, 10 * number)
    memory.save(tmp_path / "a")
    assert saved_sources(tmp_path / "a") == [memory.sources(0), memory.sources(1)]
    old = {file.name for file in (tmp_path / "a").iterdir()}
    report = forget_saved(tmp_path / "a", "a", row)
    assert report == memory.forget("a", row)
    memory.save(tmp_path / "b")
    a, b = ({file.name: file.read_bytes() for file in (tmp_path / part).iterdir()} for part in "ab")
    assert a == b, "rewritten, byte for byte as the memory itself would be"
    assert len(a) == 2
    assert set(a) != old
    with pytest.raises(InputError, match="source must be one of"):
        forget_saved(tmp_path / "a", "nobody")
    with pytest.raises(InputError, match="the stream must be one of 0 to 1, got 2"):
        forget_saved(tmp_path / "a", "b", 2)


def test_streams_that_share_a_saved_store_part_when_one_forgets(tmp_path: Path) -> None:
    model = tiny.variant("paper")
    memory = model.new_memory(keep_text=True)
    for number, name in enumerate("ab"):
        memory.write(tiny.ids(150, number), name)
    memory.select([0, 0]).save(tmp_path)
    report = forget_saved(tmp_path, "a", 1)
    assert sum(report.held["long-term"]) > 0
    both = mplus.Memory.load(tmp_path, model)
    tiny.assert_same(both.select([0]), memory)
    memory.forget("a")
    tiny.assert_same(both.select([1]), memory)


# ---------------------------------------------------------------------- texts as values


@settings(max_examples=30)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["append", "without", "file"]), st.integers(0, 5), st.integers(0, 3)), max_size=20
    )
)
def test_texts_are_values(steps: list[tuple[str, int, int]]) -> None:
    """Whatever is made of one value, in whatever order, the others stay: against plain lists."""
    state = torch.Generator().get_state()
    values: list[tuple[Texts, list[tuple[list[int], int, int]]]] = [(Texts.of(state), [])]
    for turn, (what, which, source) in enumerate(steps):
        texts, listed = values[which % len(values)]
        if what == "append":
            ids = list(range(turn, turn + 1 + source))
            text = Text(torch.tensor(ids, dtype=torch.int32), source, turn)
            values.append((texts.appended(text), [*listed, (ids, source, turn)]))
        elif what == "without":
            values.append((texts.without(source), [text for text in listed if text[1] != source]))
        else:
            values.append((Texts.from_tensors(texts.tensors(), torch.arange(4)), listed))
    for texts, listed in values:
        assert [(text.ids.tolist(), text.source, text.turn) for text in texts.chunks()] == listed
        assert len(texts) == len(listed)
        assert texts.last_turn == (listed[-1][2] if listed else -1)
        assert torch.equal(texts.generator, state)
